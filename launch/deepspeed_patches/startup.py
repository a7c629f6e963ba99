"""Start-up: an op that DeepSpeed compiles on a CPU, and that training never calls."""

import importlib
from typing import Any


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
