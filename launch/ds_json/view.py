"""Typed access to a DeepSpeed JSON: ZeRO stage, dtypes, and the facts that rules need."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Facts:
    """The values of a config that most rules need, whatever the config holds.

    A block that is no object is read as an empty one. What cannot be known, because it is wrong or
    because Hugging Face fills it in, is None for `stage` and "auto" for `precision`; `accumulate`
    is the gradient accumulation dtype, or None for the model's own.
    """

    config: dict[str, Any]
    hf: bool
    world_size: int | None
    stage: int | None
    zero: dict[str, Any]
    precision: str
    accumulate: str | None
    optimizer: str
    params: dict[str, Any]

    @classmethod
    def read(
        cls, config: dict[str, Any], *, hf: bool, world_size: int | None, wrong: set[str]
    ) -> "Facts":
        """Read the facts; `wrong` holds the keys whose values DeepSpeed does not understand."""
        zero, (kind, params) = zero_block(config), optimizer_block(config)
        stage = None if zero.get("stage") == "auto" else zero_stage(config)
        if wrong & {"zero_optimization", "zero_optimization.stage"}:
            stage = None
        bf16 = "bfloat16" if config.get("bf16") is None else "bf16"  # its older name
        precision = "fp32"
        for name, key in (("fp16", "fp16"), ("bf16", bf16)):
            if is_enabled(config, key):
                precision = name
        for key in ("fp16", bf16):
            if block(config, key).get("enabled") == "auto" or wrong & {key, f"{key}.enabled"}:
                precision = "auto"
        accumulate = dtype_name(block(config, "data_types").get("grad_accum_dtype"))
        return cls(config, hf, world_size, stage, zero, precision, accumulate, kind, params)

    def device(self, block: str) -> str:
        """The device of `offload_optimizer` or `offload_param`: "none", "cpu" or "nvme"."""
        return offload_device(self.config, block)

    def below(self, stage: int) -> bool:
        """Whether the stage is known and lower."""
        return self.stage is not None and self.stage < stage

    @property
    def offloaded(self) -> bool:
        """Whether the optimizer's step runs on the CPU."""
        return self.device("offload_optimizer") in ("cpu", "nvme")

    @property
    def adam(self) -> bool:
        """Whether the optimizer is one of DeepSpeed's two names for Adam."""
        return self.optimizer.lower() in ("adam", "adamw")

    @property
    def bf16_optimizer(self) -> bool:
        """Whether ZeRO-1 becomes DeepSpeed's BF16_Optimizer, which knows few of ZeRO's keys."""
        wide = self.accumulate == "fp32"
        offloaded = self.device("offload_optimizer") == "cpu"
        return self.stage == 1 and self.precision == "bf16" and wide and not offloaded


_DTYPE_NAMES = {
    "fp16": "fp16", "float16": "fp16", "half": "fp16", "torch.float16": "fp16",
    "bf16": "bf16", "bfloat16": "bf16", "torch.bfloat16": "bf16",
    "fp32": "fp32", "float32": "fp32", "float": "fp32", "torch.float32": "fp32",
}  # fmt: skip
_OLD_OFFLOAD = {"offload_optimizer": "cpu_offload", "offload_param": "cpu_offload_param"}
_YES = {"1", "on", "t", "true", "y", "yes"}


def dtype_name(value: Any) -> str | None:
    """bf16, fp16 or fp32 for any of the names that DeepSpeed has for it; else None."""
    return _DTYPE_NAMES.get(value) if isinstance(value, str) else None


def switched_on(value: Any) -> bool:
    """A switch as DeepSpeed's models read it, which take the words "true" and "off" too."""
    return value.strip().lower() in _YES if isinstance(value, str) else bool(value)


def block(ds_config: dict[str, Any], name: str) -> dict[str, Any]:
    """A block of a DeepSpeed config; empty if absent or not a mapping (a linter error)."""
    found = ds_config.get(name)
    return found if isinstance(found, dict) else {}


def is_enabled(ds_config: dict[str, Any], name: str) -> bool:
    """Whether a block such as `bf16`, `fp16` or `torch_autocast` is present and enabled."""
    return switched_on(block(ds_config, name).get("enabled", False))


def zero_block(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The `zero_optimization` block."""
    return block(ds_config, "zero_optimization")


def zero_stage(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed config; "3" and 3.0 are accepted too.

    0 if it is not a number: "auto", which only Accelerate fills in, or what the linter reports.
    """
    try:
        return int(zero_block(ds_config).get("stage", 0))
    except (TypeError, ValueError, OverflowError):  # the last for 1e400
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
    zero = zero_block(ds_config)
    device = block(zero, name).get("device")
    if name not in zero and switched_on(zero.get(_OLD_OFFLOAD[name])):
        device = "cpu"
    return device if isinstance(device, str) else "none"


def optimizer_block(ds_config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The optimizer's type as written (empty if there is none) and its parameters."""
    found = block(ds_config, "optimizer")
    kind = found.get("type")
    return kind if isinstance(kind, str) else "", block(found, "params")


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
        name = dtype_name(block(ds_config, "torch_autocast").get("dtype"))
        return torch.float16 if name == "fp16" else torch.bfloat16
    return training_dtype(ds_config)
