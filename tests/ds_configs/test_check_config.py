"""scripts/check_config.py through the real command."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

from launch.ds_json.strict_json import load_json
from launch.paths import ROOT
from scripts import check_config


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The real command, which takes seconds to load DeepSpeed."""
    words = [sys.executable, str(ROOT / "scripts/check_config.py"), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)


def check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The same in this process."""
    words, out, err = [str(word) for word in arguments], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = check_config.main(words)
        except SystemExit as end:  # of argparse
            code = int(str(end.code))
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def write(path: Path, **changes: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**load_json(ROOT / "ds_configs/zero2.json"), **changes}))
    return path


def test_all_our_files_are_clean() -> None:
    done = command(ROOT / "ds_configs", "--strict")
    count = len(list((ROOT / "ds_configs").rglob("*.json")))
    assert done.stdout == f"{count} files, no findings\n" and done.returncode == 0


def test_one_line_a_finding_and_errors_fail(tmp_path: Path) -> None:
    write(tmp_path / "good.json")
    (tmp_path / "a").mkdir()
    bad = write(tmp_path / "a" / "b" / "deep.json", gradient_cliping=0.5, elasticity={})
    done = check(tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert lines[0].startswith(f"{bad}: error: elasticity: ")
    assert lines[1] == (
        f"{bad}: error: gradient_cliping: unknown key; DeepSpeed ignores it without a word; "
        "did you mean 'gradient_clipping'? [unknown-key]"
    )
    assert lines[2:] == ["2 files, 2 errors, 0 warnings"]


def test_warnings_fail_only_when_strict(tmp_path: Path) -> None:
    file = write(tmp_path / "warned.json", activation_checkpointing={"profile": True})
    assert check(file).returncode == 0
    assert check(file, "--strict").returncode == 1


def test_json_output_is_nothing_but_json(tmp_path: Path) -> None:
    done = check(write(tmp_path / "a.json", bf16={"enabled": "auto"}), "--json")
    (finding,) = json.loads(done.stdout)
    assert finding["key"] == "bf16.enabled" and finding["rule"] == "auto"
    assert finding["level"] == "error" and finding["file"].endswith("a.json")
    assert done.returncode == 1


def test_hf_by_folder_or_by_flag(tmp_path: Path) -> None:
    auto = {"bf16": {"enabled": "auto"}}
    assert check(write(tmp_path / "a.json", **auto)).returncode == 1
    assert check(write(tmp_path / "a.json", **auto), "--hf").returncode == 0
    assert check(write(tmp_path / "hf" / "a.json", **auto)).returncode == 0


def test_world_size_reaches_the_batch_arithmetic(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", train_batch_size=8, train_micro_batch_size_per_gpu=2)
    assert check(file, "--world-size", "4").returncode == 0
    assert check(file, "--world-size", "3").returncode == 1
    assert check(file, "--world-size", "0").returncode == 2


# Text, line and column of the fault, words of the message.
BAD_JSON = [
    ('{\n  "a": 1, // why\n  "b": 2\n}', "2:11", "no comments"),
    ('{"a": {"b": 1,\n "b": 2}}', "2:2", "'b' is given twice"),
    ('{"a": NaN}', "1:7", "NaN is no JSON number"),
    ('{"a": 1', "1:8", "Expecting"),
    ('{"a": ' + 5000 * "1" + "}", "", "a number with thousands of digits"),
    (600 * '{"a":' + "1" + 600 * "}", "", "nested"),
    # At the comma or at the bracket behind it, by Python's version.
    ('{\n  "a": 1,\n}', "", "no comma after the last"),
]


def test_bad_json_is_a_finding_with_its_place(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.json" for number in range(len(BAD_JSON))]
    for file, (text, _, _) in zip(files, BAD_JSON, strict=True):
        file.write_text(text)
    done = check(*files)
    lines = done.stdout.splitlines()
    for file, (_, place, words), line in zip(files, BAD_JSON, lines, strict=False):
        assert line.startswith(f"{file}: error: {place}") and words in line
        assert line.endswith("[unreadable]") or "nested" in words
    count = len(BAD_JSON)
    assert done.returncode == 1 and lines[-1] == f"{count} files, {count} errors, 0 warnings"


def test_what_cannot_be_read_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    names = ["list.json", "binary.json", "empty", "zero4.json"]
    done = check(*(tmp_path / name for name in names))
    assert done.returncode == 1 and done.stdout.count("[unreadable]") == 4
    assert "did you mean 'zero" in done.stdout
    assert "Traceback" not in done.stderr


def test_keys_that_no_terminal_can_show_are_escaped(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"train_batch_size": 8, "a\\nb": 1, "\\ud800": 1, "gr\u00f6\u00dfe": 1}')
    done = command(file)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stdout.count("[unknown-key]") == 3 and len(done.stdout.splitlines()) == 5
