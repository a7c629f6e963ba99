"""Raw DeepSpeed shows the defect that `launch/deepspeed_patches/startup.py` works around.

A test here fails once DeepSpeed has repaired the defect; its message names the workaround to remove.
"""

import sys
from typing import Any
from unittest import mock

from tests.deepspeed_patches.raw import initialize, repaired
from tests.ranks import run_ranks


def ops_loaded_at_start() -> list[str]:
    import deepspeed
    from deepspeed.ops.op_builder.builder import OpBuilder

    loaded: list[str] = []

    def load(self: OpBuilder, verbose: bool = True) -> None:
        loaded.append(self.name)  # the real one would compile for half a minute

    OpBuilder.load = load
    deepspeed.init_distributed("gloo", verbose=False)
    return loaded


def test_init_distributed_compiles_shm_comm() -> None:
    assert run_ranks(ops_loaded_at_start, 1) == [["deepspeed_shm_comm"]], repaired(
        "startup.skip_shared_memory_op"
    )


def compiled_for_an_engine_with_adamw() -> list[str]:
    import torch

    for name in ("muon_optimizer", "original_muon"):  # the fork server has imported them
        del sys.modules[f"deepspeed.runtime.zero.muon.{name}"]
    compiled: list[str] = []

    def compile_kernel(kernel: Any) -> Any:
        compiled.append(kernel.__name__)
        return kernel

    with mock.patch.object(torch, "compile", compile_kernel):
        initialize(torch.nn.Linear(2, 2), {"zero_optimization": {"stage": 1}})
    return compiled


def test_an_engine_without_muon_compiles_its_kernels() -> None:
    [compiled] = run_ranks(compiled_for_an_engine_with_adamw, 1)
    assert "muon_update" in compiled, repaired("startup.import_muon_uncompiled")


def vendor_for_cpu_adam() -> tuple[int, str, str]:
    """How often the optimizer asks py-cpuinfo, the vendor that it is told, and the one that we tell it."""
    import cpuinfo
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    from launch.deepspeed_patches.startup import vendor_from_proc
    from launch.ops.builder import build_ops

    build_ops(("cpu_adam",), print)
    told = cpuinfo.get_cpu_info()
    with mock.patch("cpuinfo.get_cpu_info", return_value=told) as asked:
        raw = DeepSpeedCPUAdam([torch.zeros(1, requires_grad=True)])
    with vendor_from_proc():
        ours = DeepSpeedCPUAdam([torch.zeros(1, requires_grad=True)])
    return asked.call_count, raw.cpu_vendor, ours.cpu_vendor


def test_cpu_adam_asks_py_cpuinfo(built_ops: object) -> None:
    [(asked, raw, ours)] = run_ranks(vendor_for_cpu_adam, 1)
    assert asked == 1, repaired("startup.vendor_from_proc")
    assert ours == raw
