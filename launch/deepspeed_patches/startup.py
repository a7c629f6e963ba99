"""Start-up: what DeepSpeed compiles, or prepares to compile, and training never calls."""

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock


def skip_shared_memory_op() -> None:
    """Keep `deepspeed.init_distributed` from compiling `shm_comm`. Call it before.

    Defect: on a CPU, `init_distributed` compiles that op, for half a minute and more. Only
        `inference_all_reduce` uses it, and does without where it is missing; no setting turns it off.
    Versions: DeepSpeed 0.19.8.
    Workaround: replace the function that builds the op by one that builds none.
    Proof: test_startup.py::test_init_distributed_compiles_shm_comm
    """
    # Not `deepspeed.comm.torch`: that attribute is torch itself.
    module: Any = importlib.import_module("deepspeed.comm.torch")
    module.build_shm_op = lambda: None


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without compiling its kernels: for runs without Muon, or without compiler.

    Defect: to see whether an optimizer is Muon, every engine with ZeRO or in bf16 imports Muon. That calls
        torch.compile, which imports torch's compiler: a second of CPU time on each rank.
    Versions: DeepSpeed 0.19.8.
    Workaround: import it before, with the decorator that DeepSpeed has for a torch without a compiler.
        The class that engines look for stays DeepSpeed's own.
    Proof: test_startup.py::test_an_engine_without_muon_compiles_its_kernels
    """
    from deepspeed.runtime import compiler

    with mock.patch.object(compiler, "compile", lambda: compiler.dummy_decorator):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


@contextmanager
def vendor_from_proc() -> Iterator[None]:
    """Within it, DeepSpeed's optimizers for CPUs get the processor's vendor from /proc/cpuinfo.

    Defect: each of them asks py-cpuinfo for the vendor, to warn of fp16 on AMD. That starts processes and
        takes 1.4 s of CPU time on each rank.
    Versions: DeepSpeed 0.19.8.
    Workaround: a module in its place, which reads the one line; where there is none, the vendor is unknown
        to DeepSpeed. py-cpuinfo is not imported: that, too, starts processes.
    Proof: test_startup.py::test_cpu_adam_asks_py_cpuinfo
    """

    def vendor() -> dict[str, str]:
        try:
            found = re.search(r"^vendor_id\s*: (\S+)", Path("/proc/cpuinfo").read_text(), re.M)
        except OSError:
            found = None
        return {"vendor_id_raw": found[1]} if found else {}

    stand_in: Any = ModuleType("cpuinfo")
    stand_in.get_cpu_info = vendor
    before = sys.modules.get("cpuinfo")
    sys.modules["cpuinfo"] = stand_in
    try:
        yield
    finally:
        del sys.modules["cpuinfo"]
        if before is not None:
            sys.modules["cpuinfo"] = before
