"""scripts/doctor.py on this machine: what it finds, and its exit code."""

import json
import platform
import socket
import sys
from pathlib import Path

from launch.paths import ROOT
from tests.cli.commands import Ended, run, run_forked

DOCTOR = ROOT / "scripts/doctor.py"


def doctor(*words: str | Path) -> Ended:
    return run([sys.executable, DOCTOR, *words])


def test_a_machine_that_runs_the_tests_has_no_failing_line(
    tmp_path: Path, built_ops: object
) -> None:
    done = doctor("--folder", tmp_path, "--json")
    found = json.loads(done.output[done.output.index("[\n") :])
    assert done.code == 0, done.output
    assert [line for line in found if line["status"] == "FAIL"] == []
    told = " | ".join(line["what"] for line in found)
    assert "all-reduce between 2 ranks by gloo: " in told
    assert "GB/s bus bandwidth for 16 MiB" in told
    assert "cpu_adam" in told
    assert f"Python {platform.python_version()}" in told
    assert list(tmp_path.iterdir()) == [], "it tidies up"


def test_what_fails_is_told_with_its_remedy(tmp_path: Path) -> None:
    lock = tmp_path / "cache/cpu_adam/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_forked(
            [DOCTOR, "--folder", tmp_path, "--port", str(port)],
            {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "GLOO_SOCKET_IFNAME": "wlan7"},
        )  # fmt: skip
    assert done.code == 1
    text = " ".join(done.output.split())
    assert str(lock) in done.output.replace("\n", "")
    assert "run: rm" in text
    assert f"port {port} is in use" in text
    assert "GLOO_SOCKET_IFNAME is wlan7" in text
    assert "Traceback" not in text


def test_one_line_for_a_job_s_log(tmp_path: Path) -> None:
    version = platform.python_version()
    done = doctor("--line", "--folder", tmp_path)
    assert done.code == 0
    assert done.output.startswith(f"{platform.node()}: Python {version}, torch 2.")
    assert done.output.count("\n") == 1


def test_one_line_says_why_a_node_cannot_run(tmp_path: Path) -> None:
    missing = doctor("--line", "--folder", tmp_path / "gone")
    assert missing.code == 2
    assert f"cannot write to {tmp_path}/gone" in missing.error()


def test_a_python_without_the_packages_is_told_where_they_are(tmp_path: Path) -> None:
    bare = run([sys.executable, "-S", DOCTOR, "--folder", tmp_path])
    assert bare.code == 1
    assert f"error: {sys.executable} has no rich; run: make setup" in bare.output
    assert "Traceback" not in bare.output
