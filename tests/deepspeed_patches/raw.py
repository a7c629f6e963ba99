"""Raw DeepSpeed for the proofs: an engine from a model and a JSON, and the message of a proof that fails.

Nothing here or in the proofs uses `launch/` or `models/`: what they show is DeepSpeed's own doing.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ADAMW: dict[str, Any] = {
    "type": "AdamW",
    "params": {"lr": 0.1, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True},
}


def repaired(workaround: str) -> str:
    """What a proof says when it fails. `workaround` is a module of the package and its function."""
    return f"DeepSpeed has repaired this: remove launch/deepspeed_patches/{workaround}"


def start() -> None:
    """Join the process group: quietly, and without compiling `shm_comm` for half a minute."""
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    module: Any = importlib.import_module("deepspeed.comm.torch")
    module.build_shm_op = lambda: None
    deepspeed.init_distributed("gloo", verbose=False)


def initialize(model: Any, config: dict[str, Any], **settings: Any) -> Any:
    """DeepSpeed's engine for a model: one sample a micro batch, no clipping, and AdamW unless told.

    Args:
        model: a torch module.
        config: laid over those defaults.
        settings: go to `deepspeed.initialize`.
    """
    import deepspeed

    start()
    defaults: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0}
    if "optimizer" not in settings:
        defaults["optimizer"] = ADAMW
    parameters = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(
        model=model, model_parameters=parameters, config=defaults | config, **settings
    )[0]


@contextmanager
def operations() -> Iterator[list[tuple[str, Any, dict[str, Any]]]]:
    """What torch is asked for in this block: an operation's name, its arguments and its settings."""
    from torch.utils._python_dispatch import TorchDispatchMode

    asked: list[tuple[str, Any, dict[str, Any]]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, arguments: Any = (), settings: Any = None
        ) -> Any:
            asked.append((function.name().split("::")[1].split(".")[0], arguments, settings or {}))
            return function(*arguments, **(settings or {}))

    record: Any = Record
    with record():
        yield asked


def copies_to_fp32(asked: list[tuple[str, Any, dict[str, Any]]]) -> int:
    """How many of the operations copy a tensor to fp32."""
    import torch

    return sum(
        name == "_to_copy" and settings.get("dtype") == torch.float32 for name, _, settings in asked
    )


def weights_of(engine: Any) -> list[list[float]]:
    """This rank's fp32 weights, as its optimizer holds them, ZeRO-3's or another one."""
    optimizer = engine.optimizer
    found = getattr(optimizer, "fp32_partitioned_groups_flat", None) or [
        weights for group in optimizer.optimizer.param_groups for weights in group["params"]
    ]
    assert all(weights.numel() for weights in found)
    return [weights.tolist() for weights in found]


class TwoShards:
    """An `mpu` for models cut in two: ranks 0 and 1 hold the first, 2 and 3 the second, and so on."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, size = dist.get_rank(), dist.get_world_size()
        models = [dist.new_group([first, first + 1]) for first in range(0, size, 2)]
        datas = [dist.new_group(list(range(shard, size, 2))) for shard in range(2)]
        self.model, self.data, self.size = models[self.rank // 2], datas[self.rank % 2], size

    def get_model_parallel_rank(self) -> int:
        """Which shard this rank holds."""
        return self.rank % 2

    def get_model_parallel_world_size(self) -> int:
        """The number of shards."""
        return 2

    def get_model_parallel_group(self) -> Any:
        """The ranks of one model."""
        return self.model

    def get_data_parallel_rank(self) -> int:
        """Which model this rank's shard is of."""
        return self.rank // 2

    def get_data_parallel_world_size(self) -> int:
        """The number of models."""
        return self.size // 2

    def get_data_parallel_group(self) -> Any:
        """The ranks with the same shard."""
        return self.data
