"""Ops are built once, also when builds were cut off or start at the same time."""

import contextlib
import os
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from launch.deepspeed_patches.jit_lock import is_held, wait_for_lock_owner
from launch.deepspeed_patches.startup import skip_shared_memory_op
from launch.errors import UserError
from launch.ops import builder as op_builder
from launch.paths import ROOT
from tests.ranks import run_ranks

# A stand-in for one of DeepSpeed's ops that compiles in seconds: a builder of DeepSpeed's own kind,
# so that the build is torch's and DeepSpeed's, with their lock file.
SOURCE = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "tiny_op", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit_tiny_op() { return PyModule_Create(&module); }
"""


def build_tiny(cache: str, source: str) -> list[str]:
    """Build the stand-in in this process; returns what was said."""
    os.environ["TORCH_EXTENSIONS_DIR"] = cache
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import CPUAdamBuilder

    class TinyBuilder(CPUAdamBuilder):
        def __init__(self) -> None:
            super().__init__()
            self.name = "tiny_op"

        def sources(self) -> list[str]:
            return [source]

        def include_paths(self) -> list[str]:
            return []

        def cxx_args(self) -> list[str]:
            return ["-O0"]

    get_accelerator().create_op_builder = lambda name: TinyBuilder()
    op_builder.OPS["tiny_op"] = op_builder.OPS["cpu_adam"]
    said: list[str] = []
    op_builder.build_ops(["tiny_op"], said.append)
    assert TinyBuilder().load().__name__ == "tiny_op"
    return said


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "tiny.cpp"
    path.write_text(SOURCE)
    return str(path)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


BUILDS = "building tiny_op once, about a minute ..."


def test_processes_that_start_together_build_once(cache: Path, source: str) -> None:
    first, second = run_ranks(build_tiny, 2, str(cache), source)
    assert sorted([first, second]) == [[], [BUILDS]]
    # Built already: nothing is compiled, and torch's way of loading, with its lock, is not gone.
    (cache / "tiny_op/lock").touch()
    assert run_ranks(build_tiny, 2, str(cache), source, timeout=600) == [[], []]


def test_a_lock_without_owner_is_removed(cache: Path, source: str) -> None:
    (cache / "tiny_op").mkdir(parents=True)
    (cache / "tiny_op/lock").touch()
    said = run_ranks(build_tiny, 1, str(cache), source, timeout=600)[0]
    assert "left a lock file" in said[0]
    assert said[1:] == [BUILDS]
    assert not (cache / "tiny_op/lock").exists()


def test_a_lock_that_somebody_holds_is_waited_for(cache: Path, source: str) -> None:
    (cache / "tiny_op").mkdir(parents=True)
    script = (
        "import sys, time; held = open(sys.argv[1], 'w'); print('held', flush=True); time.sleep(99)"
    )
    lock = cache / "tiny_op/lock"
    holder = subprocess.Popen([sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert is_held(lock)
    finally:
        holder.kill()
        holder.communicate()
    assert not is_held(lock)
    assert wait_for_lock_owner(lock)  # nobody holds it now: the caller may remove it


def test_a_build_for_another_machine_is_done_again(cache: Path, source: str) -> None:
    run_ranks(build_tiny, 1, str(cache), source)
    (cache / "tiny_op" / op_builder.STAMP).write_text("torch 1.0")
    assert run_ranks(build_tiny, 1, str(cache), source) == [[BUILDS]]


def test_a_start_after_a_kill_in_mid_build_recovers(
    cache: Path, source: str, tmp_path: Path
) -> None:
    compiler = tmp_path / "c++"  # shows that it was started, then never ends
    compiler.write_text(
        f'#!/bin/bash\n[[ "$*" == *tiny.cpp* ]] || exec c++ "$@"\n'
        f"touch {tmp_path}/started\nexec sleep 600\n"
    )
    compiler.chmod(0o755)
    code = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from tests.unit.test_ops import build_tiny
        build_tiny({str(cache)!r}, {source!r})
    """)
    build = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "CXX": str(compiler)})
    compilers: list[psutil.Process] = []
    try:
        while not (tmp_path / "started").exists():
            assert build.poll() is None
            time.sleep(0.05)
        compilers = psutil.Process(build.pid).children(recursive=True)
        build.kill()  # this process alone: the compiler lives on for now
        build.wait()
        assert (cache / "tiny_op/lock").exists()
        said = run_ranks(build_tiny, 1, str(cache), source, timeout=600)[0]
    finally:
        for process in compilers:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    assert "an earlier build was cut off" in said[0]
    assert said[1:] == [BUILDS]


def test_a_failed_build_names_its_log(cache: Path, source: str) -> None:
    Path(source).write_text("this is not C++")
    with pytest.raises(UserError, match="tiny_op: the build failed") as caught:
        run_ranks(build_tiny, 1, str(cache), source)
    log = Path(str(caught.value).split()[-1])
    assert "this is not C++" in log.read_text()


def build_real(cache: str) -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = cache
    op_builder.build_ops(["cpu_adam"], print)


def test_a_missing_compiler_is_named(cache: Path) -> None:
    with pytest.raises(UserError, match=r"no-such-compiler.*apt-get install g\+\+") as caught:
        run_ranks(build_real, 1, str(cache), env={"CXX": "no-such-compiler"})
    assert "\n" not in str(caught.value)


def build_without_ninja(cache: str) -> None:
    sys.executable = "/nowhere/python"  # ninja is looked for beside it
    build_real(cache)


def test_a_missing_ninja_is_named(cache: Path) -> None:
    with pytest.raises(UserError, match="pip install ninja"):
        run_ranks(build_without_ninja, 1, str(cache), env={"PATH": "/nowhere", "CXX": "/bin/sh"})


def build_without_headers(cache: str) -> None:
    module: Any = sysconfig
    module.get_paths = lambda: {"include": "/nowhere"}
    build_real(cache)


def test_missing_python_headers_are_named(cache: Path) -> None:
    with pytest.raises(UserError, match=r"apt-get install python3\.\d+-dev"):
        run_ranks(build_without_headers, 1, str(cache))


def check_async_io(cache: str) -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = cache
    from deepspeed.accelerator import get_accelerator

    op_builder._check_tools(get_accelerator().create_op_builder("AsyncIOBuilder"), "async_io")


def test_missing_libaio_is_named(cache: Path) -> None:
    # A C compiler that cannot link anything: to DeepSpeed's own check, as if libaio were not there.
    with pytest.raises(UserError, match="apt-get install libaio-dev"):
        run_ranks(check_async_io, 1, str(cache), env={"CC": "false"})


def load_real_ops() -> tuple[float, bool]:
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import AsyncIOBuilder

    op_builder.build_ops(["cpu_adam", "async_io"], print)
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    DeepSpeedCPUAdam([parameter], lr=0.5, weight_decay=0.0).step()
    return float(parameter[0]), AsyncIOBuilder().load().aio_handle is not None


def test_what_was_loaded_here_is_what_deepspeed_uses(built_ops: tuple[str, ...]) -> None:
    value, has_handle = run_ranks(load_real_ops, 1)[0]
    assert value == pytest.approx(0.5, abs=1e-6)
    assert has_handle


def start_gloo() -> bool:
    import deepspeed
    import torch

    skip_shared_memory_op()
    deepspeed.init_distributed("gloo")
    return torch.distributed.is_initialized()


def test_no_shared_memory_op_is_built(cache: Path) -> None:
    env = {"TORCH_EXTENSIONS_DIR": str(cache)}
    assert run_ranks(start_gloo, 2, env=env) == [True, True]
    assert not cache.exists()


def test_the_cache_is_ours_unless_the_user_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert op_builder.use_private_cache().is_relative_to(ROOT / ".cache")
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(op_builder.use_private_cache())
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/somewhere")
    assert op_builder.use_private_cache() == Path("/somewhere")


def test_a_lock_of_a_build_that_runs_is_not_stale(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody of this host need hold it: the build may run on another one, or in a container."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache))
    monkeypatch.setenv("HOME", str(cache))
    monkeypatch.setattr(op_builder, "LOADS_WITHIN_SECONDS", 0)
    lock = cache / "tiny_op/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert op_builder.stale_locks() == [lock]
    with FileLock(cache / "tiny_op.building"):
        assert op_builder.stale_locks() == []
    assert op_builder.stale_locks() == [lock]
