"""Set up once for all tests: private caches, DeepSpeed's ops, and that no process is left over."""

import gc
import os
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.ops.builder import build_ops, use_private_cache
from launch.runtime.fork_server import PRELOAD
from tests.ranks import share_server

CPU_OPS = ("cpu_adam", "async_io")
MARK = "TEST_SESSION"  # inherited by whatever a test starts, however far from us it ends up
SECONDS_TO_END = 60.0
# How long a test of these folders takes, roughly, beside one of another.
LONGER = {"resume": 10, "parity": 3, "cli": 3}

# Set before torch or deepspeed is imported anywhere. `make test-gpu` sets DS_ACCELERATOR=cuda; all
# other tests run on the CPU, also on a machine with GPUs.
os.environ.setdefault(MARK, uuid.uuid4().hex)
if os.environ.setdefault("DS_ACCELERATOR", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# The vector instructions that the CPU says it has do work: torch.compile need not compile a program for
# each, and load it in a process that imports torch, in every rank.
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"
use_private_cache()

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have their controller's
    _caches = tempfile.TemporaryDirectory(prefix="test-caches-")
    for name in (
        "HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_CACHE_DIR", "HYPOTHESIS_STORAGE_DIRECTORY",
    ):  # fmt: skip
        os.environ[name] = str(Path(_caches.name, name.lower()))
    # Launchers leave folders behind, and so does whatever a test kills: theirs goes with this one.
    os.environ["TMPDIR"] = str(Path(_caches.name, "tmp"))
    Path(os.environ["TMPDIR"]).mkdir()

PRELOAD.append("tests.warm")  # of the fork server

# Of what is imported to collect the tests nothing is garbage.
gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    """Share the fork server between pytest-xdist's workers."""
    is_worker = hasattr(config, "workerinput")
    if is_worker or config.getoption("numprocesses", None):
        share_server(is_worker)


def pytest_collection_finish() -> None:
    """Collect garbage again, of what the tests make."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files: clusters first, which mostly wait; last what needs DeepSpeed's ops.

    `make test` builds those meanwhile. Of the others the largest come first: a worker takes a file at
    a time, and a long one at the end would leave the others idle.
    """

    def size(file: Path) -> int:
        return tests[file] * LONGER.get(file.parent.name, 1)

    tests = Counter(item.path for item in items)
    late = {item.path for item in items if "built_ops" in getattr(item, "fixturenames", ())}
    items.sort(
        key=lambda item: (
            item.path in late,
            "cluster" not in item.path.parts,
            -size(item.path),
            item.path,
        )
    )


@pytest.fixture(scope="session")
def built_ops() -> tuple[str, ...]:
    """DeepSpeed's CPU ops, built if need be, for tests whose ranks load them."""
    build_ops(CPU_OPS, print)
    return CPU_OPS


def _left_over() -> Iterator[psutil.Process]:
    """Processes of this session, other than ourselves and our own helpers.

    A direct child with Python's `multiprocessing` in its command line is the fork server or the
    resource tracker; those end when we do.
    """
    own = psutil.Process()
    ours = {own.pid, *(parent.pid for parent in own.parents())}
    for process in psutil.process_iter():
        try:
            if process.pid in ours or process.environ().get(MARK) != os.environ[MARK]:
                continue
            helper = "multiprocessing" in " ".join(process.cmdline()) and process.ppid() == own.pid
            if not helper and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """End what tests have left running, and fail the session for it."""
    if hasattr(session.config, "workerinput"):  # of pytest-xdist; its controller looks for all
        return
    deadline = time.monotonic() + SECONDS_TO_END
    while (found := list(_left_over())) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in found:
        try:
            print(f"\nleft over: {process.pid} {' '.join(process.cmdline())[:300]}")
            process.kill()
        except psutil.NoSuchProcess:
            continue
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
