"""Workarounds for DeepSpeed at start-up."""

import importlib
import importlib.metadata
import importlib.util
from typing import Any


def skip_shared_memory_op() -> None:
    """Keep `deepspeed.init_distributed` from compiling `shm_comm`, half a minute and more on a CPU.

    Only `inference_all_reduce` uses that op, and it takes the process group's all-reduce where the
    op is missing; training never calls it. DeepSpeed has no setting for this.
    """
    # Not `deepspeed.comm.torch`: that attribute is torch itself.
    module: Any = importlib.import_module("deepspeed.comm.torch")
    module.build_shm_op = lambda: None
