"""LoRA (arXiv:2106.09685): small trained matrices beside the frozen weights of a transformers model.

peft puts them into the model and says how they are saved. What is left to do here is what peft does
not know of: weights that DeepSpeed partitions, and masters in fp32. DeepSpeed trains what requires a
gradient; frozen weights are in no optimizer, and ZeRO-3 partitions and gathers them like any others.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from launch.checkpoint.full_weights import held_weights
from launch.config.schema import Lora
from launch.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"  # peft's name for an only adapter; part of the parameters' names
FILE = "adapter_model.safetensors"


def add_adapters(model: "PreTrainedModel", path: str, lora: Lora, seed: int) -> None:
    """Put adapters into a whole model and freeze the rest. Their initial weights depend on `seed` alone.

    As in the paper, A is drawn at random and B is zero, so that the model computes what it did.

    Raises:
        ValueError: if no layer is called so, or one of the layers is not linear, or shares its weight.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=path,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
    )
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    # On the CPU in every layout: the same numbers are drawn on every rank.
    torch.manual_seed(seed)
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:  # no layer is called so
        raise ValueError(f"model.lora.targets: {str(error).splitlines()[0]}") from None
    for name, layer in adapted_layers(model).items():
        weight = getattr(layer.base_layer, "weight", None)
        if not hasattr(layer, "lora_A") or len(layer.lora_A) == 0 or weight is None:
            raise ValueError(
                f"model.lora.targets: {name} is a {type(layer.base_layer).__name__}, and only linear "
                "layers get adapters; leave it out"
            )
        shared = owners[id(weight)]
        if len(shared) > 1:
            raise ValueError(
                f"model.lora.targets: {' and '.join(shared)} are one weight, which cannot get an "
                "adapter in one place alone; leave it out"
            )


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that peft has put in, by their names, which are those of the layers that they wrap."""
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def save_adapter(engine: DeepSpeedEngine, run: Path) -> Path:
    """Write the adapters in fp32 into the folder adapter/ of a run, which is returned.

    `PeftModel.from_pretrained(base, folder)` opens it. It is a folder of its own because transformers
    adds an adapter to the weights that it finds it beside, and those have it merged. Rank 0 writes;
    every rank must call this.

    Raises:
        UserError: if the disk is full or not writable.
    """
    folder = run / "adapter"
    model: Any = engine.module.model
    tensors: dict[str, Tensor] = {}
    for name, held in held_weights(engine).items():
        if f".{ADAPTER}." in name:
            tensor = held()  # collective
            key = f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}"
            tensors[key] = tensor.to("cpu", copy=True).contiguous()
    if engine.global_rank == 0:
        try:
            folder.mkdir(exist_ok=True)
            save_file(tensors, folder / FILE, metadata={"format": "pt"})
            model.peft_config[ADAPTER].save_pretrained(folder)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{folder}: cannot write the adapter ({error}); make room, then --resume auto writes it "
                "from the last checkpoint"
            ) from error
    return folder


@torch.no_grad()
def merge_adapters(engine: DeepSpeedEngine) -> None:
    """Add `alpha / rank * B A` to each frozen weight, and take the adapters out. Every rank calls it.

    Afterwards the model has the base model's layers and names, and cannot be trained.
    """
    model: Any = engine.module.model
    held = held_weights(engine)
    for name, layer in adapted_layers(model).items():
        a, b = (held[f"{name}.lora_{part}.{ADAPTER}.weight"]() for part in "AB")
        change = layer.scaling[ADAPTER] * (b @ a)
        weight = layer.base_layer.weight
        # Under ZeRO-3, rank 0's is kept; all ranks compute the same.
        gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
            [weight], modifier_rank=0, enabled=hasattr(weight, "ds_id")
        )
        with gathered:
            # GPT-2 keeps its weights transposed.
            change = change.T if layer.fan_in_fan_out else change
            weight.copy_(weight.float() + change.to(weight.device))
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.base_layer)
