"""Raw DeepSpeed shows what `launch/deepspeed_patches/nvme_checkpoint.py` and `nvme_folder.py` work around.

A test here fails once DeepSpeed has repaired the defect; its message names the workaround to remove.
"""

from pathlib import Path
from typing import Any

from tests.deepspeed_patches.raw import initialize, repaired
from tests.ranks import run_ranks


def nvme_engine(swap: Path) -> Any:
    """A model of one matrix of 4 MB, whose optimizer is swapped; ZeRO-3 in fp32."""
    import torch

    from launch.ops.builder import build_ops

    build_ops(("cpu_adam", "async_io"), print)  # loaded, so that DeepSpeed compiles nothing here
    offload = {"device": "nvme", "nvme_path": str(swap)}
    adam = {"type": "AdamW", "params": {"lr": 0.1}}  # CPUAdam: torch's cannot be swapped
    return initialize(
        torch.nn.Linear(1024, 1024, bias=False),
        {"optimizer": adam, "zero_optimization": {"stage": 3, "offload_optimizer": offload}},
    )


def adams_step(engine: Any) -> float:
    """Take a step; then Adam's count of them in the one sub-group, read back from its swap file."""
    import torch

    engine.backward(engine(torch.ones(1, 1024)).sum())
    engine.step()
    optimizer = engine.optimizer
    optimizer._optimizer_states_and_gradient_swap_in(0)
    return float(optimizer.optimizer.state[optimizer.fp32_partitioned_groups_flat[0]]["step"])


def step_and_save(folder: Path) -> float:
    engine = nvme_engine(folder / "swap")
    step = adams_step(engine)
    engine.optimizer._optimizer_states_and_gradient_swap_out(0)
    engine.save_checkpoint(str(folder / "saved"))
    return step


def load_and_step(folder: Path) -> float:
    engine = nvme_engine(folder / "swap of the next run")
    loaded, _ = engine.load_checkpoint(str(folder / "saved"))
    assert loaded is not None
    return adams_step(engine)


def test_checkpoint_restores_no_optimizer_state(tmp_path: Path, built_ops: object) -> None:
    assert run_ranks(step_and_save, 1, tmp_path) == [1.0]
    # Adam begins again; it should have counted to 2.
    assert run_ranks(load_and_step, 1, tmp_path) == [1.0], repaired("nvme_checkpoint.in_memory")


def swap_files(folder: Path, seed: int) -> dict[str, bytes]:
    """What lies in the folder after a run with weights of its own has started."""
    import torch

    torch.manual_seed(seed)
    nvme_engine(folder)
    return {str(f): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_two_runs_write_the_same_swap_files(tmp_path: Path, built_ops: object) -> None:
    first, second = (run_ranks(swap_files, 1, tmp_path, seed)[0] for seed in range(2))
    assert first
    changed = [name for name in first if second.get(name) != first[name]]
    assert changed, repaired("nvme_folder.with_own_swap_folder")
