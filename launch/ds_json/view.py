"""Typed access to a DeepSpeed JSON: ZeRO stage, dtypes, and the facts that rules need."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Facts:
    """A config whose blocks have the right types, and the values that most rules need.

    `precision` is "bf16", "fp16", "fp32", or "auto" if Hugging Face decides; `accumulate` is the
    gradient accumulation dtype, or None for the model's own dtype.
    """

    config: dict[str, Any]
    hf: bool
    world_size: int | None
    stage: int
    zero: dict[str, Any]
    precision: str
    accumulate: str | None
    optimizer: str
    params: dict[str, Any]

    @classmethod
    def read(cls, config: dict[str, Any], *, hf: bool, world_size: int | None) -> "Facts | None":
        """Return None if a block is not an object, because its contents cannot be checked."""
        zero, optimizer = config.get("zero_optimization", {}), config.get("optimizer", {})
        types = config.get("data_types", {})
        bf16 = config.get("bf16", config.get("bfloat16", {}))
        fp16 = config.get("fp16", {})
        params = optimizer.get("params") or {} if isinstance(optimizer, dict) else None
        if not all(isinstance(block, dict) for block in (zero, types, bf16, fp16, params)):
            return None
        stage = zero_stage(config)
        precision = "fp32"
        for name, block in (("fp16", fp16), ("bf16", bf16)):
            enabled = block.get("enabled", False)
            precision = "auto" if enabled == "auto" else name if enabled else precision
        accumulate = types.get("grad_accum_dtype")
        kind = str(optimizer.get("type", ""))
        return cls(config, hf, world_size, stage, zero, precision, accumulate, kind, params or {})

    def device(self, block: str) -> str:
        """The device of `offload_optimizer` or `offload_param`: "none", "cpu" or "nvme"."""
        return offload_device(self.config, block)

    @property
    def adam(self) -> bool:
        """Whether the optimizer is one of DeepSpeed's two names for Adam."""
        return self.optimizer.lower() in ("adam", "adamw")

    @property
    def bf16_optimizer(self) -> bool:
        """Whether ZeRO-1 becomes DeepSpeed's BF16_Optimizer, which knows few of ZeRO's keys."""
        wide = self.accumulate in ("fp32", "float32", "float")
        offloaded = self.device("offload_optimizer") == "cpu"
        return self.stage == 1 and self.precision == "bf16" and wide and not offloaded


_DTYPE_NAMES = {
    "fp16": "fp16", "float16": "fp16", "half": "fp16", "bf16": "bf16", "bfloat16": "bf16",
    "fp32": "fp32", "float32": "fp32", "float": "fp32",
}  # fmt: skip


def block(ds_config: dict[str, Any], name: str) -> dict[str, Any]:
    """A block of a DeepSpeed config; empty if absent or not a mapping (a linter error)."""
    found = ds_config.get(name)
    return found if isinstance(found, dict) else {}


def is_enabled(ds_config: dict[str, Any], name: str) -> bool:
    """Whether a block such as `bf16`, `fp16` or `torch_autocast` is present and enabled."""
    return bool(block(ds_config, name).get("enabled", False))


def zero_block(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The `zero_optimization` block."""
    return block(ds_config, "zero_optimization")


def zero_stage(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed config; "3" and 3.0 are accepted too.

    0 if it is not a number: "auto", which only Accelerate fills in, or what the linter reports.
    """
    try:
        return int(zero_block(ds_config).get("stage", 0))
    except (TypeError, ValueError):
        return 0


def memory_efficient_linear(ds_config: dict[str, Any]) -> bool:
    """Whether DeepSpeed replaces F.linear by its own: under stage 3, unless it is told not to."""
    return zero_stage(ds_config) == 3 and bool(
        zero_block(ds_config).get("memory_efficient_linear", True)
    )


def offload_blocks(ds_config: dict[str, Any]) -> list[dict[str, Any]]:
    """The blocks `offload_optimizer` and `offload_param`, if present; not copies."""
    found = (block(zero_block(ds_config), name) for name in ("offload_optimizer", "offload_param"))
    return [each for each in found if each]


def offload_device(ds_config: dict[str, Any], name: str) -> str:
    """The device of `offload_optimizer` or `offload_param`: "none", "cpu" or "nvme"."""
    return str(block(zero_block(ds_config), name).get("device", "none"))


def optimizer_block(ds_config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The optimizer's type as written (empty if there is none) and its parameters."""
    found = block(ds_config, "optimizer")
    return str(found.get("type", "")), block(found, "params")


def accumulation_dtype(ds_config: dict[str, Any]) -> str | None:
    """The gradient accumulation dtype as written; None: the model's own."""
    name: str | None = block(ds_config, "data_types").get("grad_accum_dtype")
    return name


def training_dtype(ds_config: dict[str, Any]) -> "torch.dtype":
    """The dtype of forward and backward in a DeepSpeed config."""
    import torch

    if is_enabled(ds_config, "bf16") or is_enabled(ds_config, "bfloat16"):  # its older name
        return torch.bfloat16
    if is_enabled(ds_config, "fp16"):
        return torch.float16
    return torch.float32


def compute_dtype(ds_config: dict[str, Any]) -> "torch.dtype":
    """The dtype of matrix multiplications: torch_autocast's if enabled, else `training_dtype`."""
    import torch

    if is_enabled(ds_config, "torch_autocast"):
        name = str(block(ds_config, "torch_autocast").get("dtype", "bfloat16")).removeprefix(
            "torch."
        )
        return torch.float16 if name in ("float16", "fp16", "half") else torch.bfloat16
    return training_dtype(ds_config)
