"""Compiled ops: locks that killed builds leave behind.

`launch/ops/builder.py` builds ops under a lock of its own, and uses these for what it finds.
"""

import contextlib
import importlib.util
import time
from pathlib import Path
from typing import Any


def wait_for_lock_owner(lock: Path) -> bool:
    """Wait while a process builds under torch's `lock`; True if a lock is left that nobody holds.

    Defect: DeepSpeed builds ops with torch, which makes a file named `lock` and removes it after the
        build. A build that is killed leaves it, and every later start waits for ever, in silence.
    Versions: DeepSpeed 0.19.8 with torch 2.13.
    Workaround: torch keeps the file open while it builds, so /proc tells whether somebody does. Wait
        only then; the caller removes what is left.
    Proof: test_jit_lock.py::test_a_lock_of_a_killed_build_is_waited_for
    """
    while lock.exists() and is_held(lock):
        time.sleep(0.5)
    return lock.exists()


def is_held(path: Path) -> bool:
    """Whether a process of this host has the file open. Part of the workaround `wait_for_lock_owner`."""
    wanted = str(path.resolve())
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        # Processes end while we look, and others' are not ours to read.
        with contextlib.suppress(OSError):
            if str(link.readlink()) == wanted:
                return True
    return False


def load_built_op(builder: Any, name: str, library: Path) -> None:
    """Load a built op into this process. Part of the workaround `wait_for_lock_owner`.

    It stays clear of torch's lock, on which ranks would take turns. It takes milliseconds; DeepSpeed's
    own way asks for the CPU's name, which takes 2 seconds.

    Args:
        builder: DeepSpeed's builder of the op; its `load()` then returns the module.
        name: the op's name, and the module's.
        library: the shared object.
    """
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    builder._loaded_ops[name] = module
