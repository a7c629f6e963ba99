import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from launch.config.schema import Data
from launch.data.local_files import local_files
from launch.data.sources import documents
from launch.errors import UserError
from launch.paths import ROOT

both = pytest.mark.parametrize("streaming", [True, False])


def read(cache: Path, source: str | list[str], **settings: Any) -> dict[str, str]:
    data = Data(source=source, sequence_length=8, **settings)
    found = list(documents(data, local_files(data), cache / "copies"))
    assert len({key for key, _ in found}) == len(found)
    return dict(found)


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> str:
    parquet.write_table(pa.table(columns), path)
    return str(path)


@both
def test_each_text_file_is_one_document(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "texts [1] *"
    (folder / "aa").mkdir(parents=True)
    (folder / "b.txt").write_text("two\n\nparagraphs\n")
    (folder / "aa" / "a.md").write_text("# é\n", encoding="utf-8")
    (folder / "c.py").write_text("pass\n")
    (folder / "empty.txt").write_text("")
    (folder / ".hidden.txt").write_text("no")
    (folder / "ignored.png").write_bytes(b"\x89PNG")
    expected = {"aa/a.md": "# é\n", "b.txt": "two\n\nparagraphs\n", "c.py": "pass\n"}
    found = read(tmp_path, str(folder), streaming=streaming)
    assert found == {f"{folder.name}/{key}": text for key, text in expected.items()}
    assert list(found) == sorted(found)


@both
def test_jsonl_has_a_document_a_row(tmp_path: Path, streaming: bool) -> None:
    rows = [{"body": "a\nb", "n": 1}, {"body": None}, {"body": ""}, {"body": "c\u2028", "z": [1]}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    with Path(path).open("a") as file:
        file.write('\n{"body": "half \\ud800"}\n')
    found = read(tmp_path, path, text_field="body", streaming=streaming)
    assert found == {"x.jsonl:0": "a\nb", "x.jsonl:3": "c\u2028", "x.jsonl:4": "half ?"}


def test_jsonl_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n', encoding="utf-8-sig")
    assert read(tmp_path, str(tmp_path / "x.jsonl")) == {"x.jsonl:0": "a"}


@both
def test_parquet_has_a_document_a_row(tmp_path: Path, streaming: bool) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"id": [1, 2, 3], "text": ["a", None, "c"]})
    assert read(tmp_path, path, streaming=streaming) == {"x.parquet:0": "a", "x.parquet:2": "c"}


@both
def test_a_mixed_list_and_a_glob(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "a.txt").write_text("A")
    jsonl = write_jsonl(tmp_path / "b.jsonl", [{"text": "B"}])
    columns = write_parquet(tmp_path / "c.parquet", {"text": ["C"]})
    expected = {"a.txt": "A", "b.jsonl:0": "B", "c.parquet:0": "C"}
    several = [columns, str(tmp_path / "a.txt"), jsonl]
    assert read(tmp_path, several, streaming=streaming) == expected
    assert read(tmp_path, str(tmp_path / "*.*"), streaming=streaming) == expected


def test_keys_do_not_depend_on_where_the_corpus_lies(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place / "set" / "sub").mkdir(parents=True)
        (tmp_path / place / "set" / "sub" / "a.txt").write_text("A")
    names = ["here/set", "there/set", "here/set/**/*.txt", "there/set/**/*.txt"]
    keys = [list(read(tmp_path, str(tmp_path / name))) for name in names]
    assert keys == [["set/sub/a.txt"]] * 2 + [["a.txt"]] * 2


def test_the_standard_library_is_real_and_without_tests(tmp_path: Path) -> None:
    data = Data(sequence_length=8)
    files = local_files(data)
    assert files is not None
    keys = [file.key for file in files]
    assert keys == sorted(keys)
    assert {"argparse.py", "json/decoder.py"} <= set(keys)
    parts = {part for key in keys for part in key.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert not [key for key in keys if key.startswith(("_sysconfigdata", "config-"))]
    texts = dict(documents(data, files, tmp_path))
    assert texts["argparse.py"] == Path(str(sys.modules["argparse"].__file__)).read_text()
    assert sum(map(len, texts.values())) > 3_000_000


def test_stdlib_files_in_another_encoding_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert read(tmp_path, "python-stdlib") == {"good.py": "x = 1\n"}
    (tmp_path / "good.py").unlink()
    (tmp_path / "latin.py").unlink()
    with pytest.raises(UserError, match="this Python has no source files"):
        read(tmp_path, "python-stdlib")


@both
def test_a_hub_set_is_read_by_subset_split_and_field(tmp_path: Path, streaming: bool) -> None:
    # A folder laid out as on the Hub; the library reads it as it reads a repository. The name goes
    # past local_files, which would take the folder for local files.
    folder = tmp_path / "repo"
    folder.mkdir()
    write_parquet(folder / "train.parquet", {"body": ["no"], "n": [0]})
    write_parquet(folder / "test.parquet", {"body": ["yes", ""], "n": [1, 2]})
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - {split: train, path: train.parquet}\n"
        "  - {split: test, path: test.parquet}\n---\n"
    )

    def hub(**changes: Any) -> dict[str, str]:
        settings = {"subset": "en", "split": "test", "text_field": "body"} | changes
        data = Data(source=str(folder), sequence_length=8, streaming=streaming, **settings)
        return dict(documents(data, None, tmp_path / "hub"))

    assert hub() == {"0": "yes"}
    for changes, message in (
        ({"subset": "fr"}, "fr"),
        ({"split": "dev"}, "dev"),
        ({"text_field": "bodi"}, "did you mean 'body'"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            hub(**changes)
        assert "\n" not in str(caught.value)


def test_another_process_finds_the_same_documents(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("b", "a", "c"):
        (corpus / f"{name}.txt").write_text(name)
    code = (
        "import sys; from pathlib import Path\n"
        "from launch.data.local_files import *; from launch.data.sources import *\n"
        "data = Data(source=sys.argv[1], sequence_length=8)\n"
        "print(list(documents(data, local_files(data), Path(sys.argv[2]))))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, str(corpus), str(tmp_path / f"copies{seed}")],
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            cwd=ROOT,
            check=True,
            capture_output=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(outputs) == 1


@both
def test_json_csv_and_tsv_have_a_document_a_row(tmp_path: Path, streaming: bool) -> None:
    write_jsonl(tmp_path / "array.json", [[{"text": "a", "n": 1}, {"text": "b"}]])
    write_jsonl(tmp_path / "lines.json", [{"text": "c"}, {"text": "d", "n": 1}])
    (tmp_path / "x.csv").write_text('n,text\n1,"e, with\na line"\n2,NA\n')
    (tmp_path / "y.tsv").write_text("n\ttext\n1\tf, g\n")
    assert list(read(tmp_path, str(tmp_path), streaming=streaming).values()) == [
        "a", "b", "c", "d", "e, with\na line", "NA", "f, g",
    ]  # fmt: skip


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress,
}  # fmt: skip


@both
@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_are_read(tmp_path: Path, suffix: str, streaming: bool) -> None:
    rows = b'{"text": "one"}\n{"text": "two"}\n'
    for name, content in (("a.txt", b"plain"), ("b.jsonl", rows), ("c.csv", b"text\nthree\n")):
        (tmp_path / f"{name}.{suffix}").write_bytes(COMPRESSORS[suffix](content))
    assert list(read(tmp_path, str(tmp_path), streaming=streaming).values()) == [
        "plain", "one", "two", "three",
    ]  # fmt: skip


@both
def test_suffixes_in_capitals_links_to_folders_and_blank_documents(
    tmp_path: Path, streaming: bool
) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "corpus"
    elsewhere.mkdir()
    folder.mkdir()
    (elsewhere / "A.TXT").write_text("far", encoding="utf-8-sig")
    (elsewhere / "back").symlink_to(folder)  # a circle
    (folder / "link").symlink_to(elsewhere)
    (folder / "b.JSONL").write_text('{"text": "near"}\n{"text": "  \\n"}\n')
    (folder / "blank.txt").write_text(" \n\n")
    assert read(tmp_path, str(folder), streaming=streaming) == {
        "corpus/b.JSONL:0": "near", "corpus/link/A.TXT": "far",
    }  # fmt: skip


def test_what_a_folder_holds_besides_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "b.pdf", "c.PDF", "notes", "README.md", "LICENSE", "d.parquet.gz"):
        (tmp_path / name).write_text("x")
    said: list[str] = []
    files = local_files(Data(source=str(tmp_path), sequence_length=8), said.append)
    assert files is not None and [file.path.name for file in files] == ["a.txt"]
    assert said == [
        f"data.source: 6 files of {tmp_path} are not read: 1 x .PDF, 1 x .gz, 1 x .pdf, 1 x LICENSE, "
        "1 x README.md, 1 x notes"
    ]
    named = local_files(Data(source=str(tmp_path / "README.md"), sequence_length=8))
    assert named is not None and len(named) == 1  # asked for by name


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to(tmp_path / "no such file")
    with pytest.raises(UserError, match=r"gone\.txt is not readable \(No such file"):
        read(tmp_path, str(tmp_path))


def test_a_row_without_the_field_is_named_by_its_line(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}, {"txt": "b"}])
    with pytest.raises(UserError, match=r"x\.jsonl line 2 has no 'text'; did you mean 'txt'"):
        read(tmp_path, file)
