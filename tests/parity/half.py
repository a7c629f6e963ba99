"""fp16 for the parity cases: a loss scale that stays, so that no step is skipped."""

from pathlib import Path
from typing import Any

from launch.parity.run import TrainingRecord, run_layout


def fp16(stage: int) -> tuple[str, ...]:
    """Overrides that put a tiny recipe of this ZeRO stage (1 to 3) into fp16."""
    return (
        f"deepspeed.config=ds_configs/zero{stage}_fp16.json",
        "deepspeed.bf16=null",
        "deepspeed.fp16.loss_scale=1024",
    )


def run_layout_in_fp16(values: dict[str, Any], scratch: Path, uneven: bool) -> TrainingRecord:
    """`run_layout` on a CPU that DeepSpeed takes for one with fp16 instructions.

    torch computes fp16 on any; what is above it (loss scale, casts, ZeRO) is the real thing.
    """
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True
    return run_layout(values, scratch, uneven)
