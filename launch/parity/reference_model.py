"""The reference's model.

For family hf, it is transformers' own: configuration, weights, dtypes and forward pass come from
`from_pretrained`, and nothing of `models/hf.py` or `launch/training/build_model.py` is used. A GPT
is built by the code that it is to check; `tests/unit/test_gpt.py` compares it with transformers.
"""

import sys
import tempfile
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import nn

from launch.config.schema import HFModel, Lora, Recipe
from launch.training.build_model import build_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def reference_model(recipe: Recipe, dtype: torch.dtype, device: str) -> nn.Module:
    """A recipe's model with its initial weights: a GPT, or a PreTrainedModel without a wrapper.

    The GPT computes its MLPs and its loss at once and keeps all on the device, whatever the recipe says.
    """
    if isinstance(recipe.model, HFModel):
        model: Any = _as_transformers_loads_it(recipe.model, recipe.train.seed, dtype)
        if recipe.model.lora is not None:
            _add_adapters(model, recipe.model.lora, recipe.train.seed)
        return cast("nn.Module", model.to(device).train())
    plain = {"cpu_checkpointing": False, "mlp_chunks": 1, "loss_chunks": 1}
    whole = recipe.model.model_copy(update=plain)
    return build_model(recipe.model_copy(update={"model": whole}), dtype, device)


def _add_adapters(model: "PreTrainedModel", lora: Lora, seed: int) -> None:
    """As peft makes them, in the dtype of the weights that they lie beside."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets)
    torch.manual_seed(seed)
    get_peft_model(model, config, autocast_adapter_dtype=False)  # changes the model itself


def is_pretrained_model(model: nn.Module) -> "TypeGuard[PreTrainedModel]":
    """Whether a model is transformers' own; does not import transformers, which takes seconds."""
    loaded = sys.modules.get("transformers.modeling_utils")
    return loaded is not None and isinstance(model, loaded.PreTrainedModel)


def _as_transformers_loads_it(spec: HFModel, seed: int, dtype: torch.dtype) -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModelForCausalLM

    def load(path: str) -> "PreTrainedModel":
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype
        )
        return model

    config: Any = AutoConfig.from_pretrained(spec.path, **spec.changes)
    if spec.pretrained:
        return load(spec.path)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        return load(folder)
