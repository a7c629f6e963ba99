"""The model and batch that a plan is for: a recipe, a named size, a config.json, or sizes."""

import json
from pathlib import Path
from typing import Any

from launch.config.load import load_recipe, recipe_from_dict
from launch.config.schema import GPTModel, Recipe
from launch.errors import UserError, nearest_or_all
from models.config import SIZES

# Architectures of transformers that our decoder is the same as, and what they need of it.
_LLAMA = {
    "position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False,
}  # fmt: skip
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {},
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": {**_LLAMA, "qk_norm": True},
}
# Its name in a GPT-2's config.json and in the others'.
_KEYS = {
    "layers": ("n_layer", "num_hidden_layers"),
    "hidden": ("n_embd", "hidden_size"),
    "heads": ("n_head", "num_attention_heads"),
    "vocab": ("vocab_size", "vocab_size"),
    "context": ("n_positions", "max_position_embeddings"),
    "kv_heads": ("", "num_key_value_heads"),
    "head_dim": ("", "head_dim"),
    "ffn": ("n_inner", "intermediate_size"),
}

_UNKNOWN = 10**6  # a context that nobody gave


def recipe_for(
    config: str | None,
    model: str | None,
    sizes: dict[str, int],
    overrides: list[str],
    sequence: int | None,
    global_batch: int | None,
) -> Recipe:
    """The recipe whose layout is planned; `sequence` and `global_batch` replace its own.

    Args:
        config: a recipe file.
        model: a named size ("gpt_6b7", "6b7", "llama3_8b"), a config.json, or a folder with one.
        sizes: sizes given one by one, or changes to `model`.
        overrides: `--set` of a recipe.
        sequence: tokens of a row; default: the recipe's, or 2048 but at most the model's context.
        global_batch: sequences of a step; default: the recipe's, or 512.

    Raises:
        UserError: for an unknown model, another architecture, or sizes that contradict each other.
    """
    if config is not None:
        if model is not None or sizes:
            raise UserError("--config: a recipe has its model; leave out --model and the sizes")
        recipe = load_recipe(config, overrides)
    else:
        recipe = _made(_model_values(model, sizes), overrides, sequence)
    if not isinstance(recipe.model, GPTModel):
        raise UserError(
            "model.family: memory is planned for family gpt; give its config.json as --model, if it is one "
            f"of {', '.join(_ARCHITECTURES)}"
        )
    changes: dict[str, Any] = {}
    if sequence is not None:
        changes["data"] = recipe.data.model_copy(update={"sequence_length": sequence})
    if global_batch is not None:
        changes["train"] = recipe.train.model_copy(update={"global_batch_size": global_batch})
    return recipe_from_dict(recipe.model_copy(update=changes).model_dump(), where="--model")


def _model_values(model: str | None, sizes: dict[str, int]) -> dict[str, Any]:
    if model is None:
        missing = [n for n in ("layers", "hidden", "heads", "vocab") if n not in sizes]
        if missing:
            given = "give --model, --config, or all of --layers --hidden --heads --vocab"
            raise UserError(f"--{missing[0]}: the model has no {missing[0]}; {given}")
        return {"context": _UNKNOWN, **sizes}
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" or path.is_file():
        return {**_from_transformers(path), **sizes}
    name = model.removeprefix("gpt_")
    if name not in SIZES:
        raise UserError(f"--model: '{model}' is not known;{nearest_or_all(name, SIZES)}")
    return {"size": name, **sizes}


def _from_transformers(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--model: {path} is not a readable config.json: {error}") from None
    names = values.get("architectures") if isinstance(values, dict) else None
    name = names[0] if isinstance(names, list) and names else None
    if name not in _ARCHITECTURES:
        raise UserError(
            f"--model: {path} is of architecture {name or 'unknown'}; memory can be planned for "
            f"{', '.join(_ARCHITECTURES)}, or for sizes that you give: --layers --hidden --heads --vocab"
        )
    found = dict(_ARCHITECTURES[name])
    gpt2 = name == "GPT2LMHeadModel"
    for ours, theirs in _KEYS.items():
        value = values.get(theirs[0 if gpt2 else 1])
        if isinstance(value, int) and value > 0:
            found[ours] = value
    found["tied"] = bool(values.get("tie_word_embeddings", gpt2))
    missing = [key for key in ("layers", "hidden", "heads", "vocab", "context") if key not in found]
    if missing:
        raise UserError(f"--model: {path} has no {_KEYS[missing[0]][0 if gpt2 else 1]}")
    return found


def _made(values: dict[str, Any], overrides: list[str], sequence: int | None) -> Recipe:
    """A recipe that trains the model on text that needs no download."""
    if overrides:
        raise UserError("--set: it changes a recipe; give one with --config")
    context = values.get("context") or SIZES[values["size"]].context
    length = sequence or min(2048, context)
    if values.get("context") == _UNKNOWN:
        values["context"] = length  # positions are not known, and not needed to plan
    return recipe_from_dict(
        {
            "name": "plan",
            "model": values,
            "data": {"source": "python-stdlib", "tokenizer": "bytes", "sequence_length": length},
            "train": {
                "steps": 1000, "global_batch_size": 512, "micro_batch_size": 1, "compile": True
            },
            "deepspeed": {"config": "ds_configs/zero1.json"},
        },
        where="--model",
    )  # fmt: skip
