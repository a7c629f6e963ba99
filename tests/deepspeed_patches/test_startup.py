"""Raw DeepSpeed shows the defect that `launch/deepspeed_patches/startup.py` works around.

A test here fails once DeepSpeed has repaired the defect; its message names the workaround to remove.
"""

from tests.deepspeed_patches.raw import repaired
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
