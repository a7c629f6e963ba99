"""From a row of values to a small recipe; the parity tests build theirs from the same parts.

A model of 20,000 to 60,000 parameters, 64 tokens a sequence, four steps: enough that each path of
DeepSpeed is taken, and that a step clips, decays and warms up. A loss is a mean over tokens: with
fewer of them, its rounding in 16 bits outgrows the bounds.
"""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from launch.certify.axes import Row, ranks
from launch.config.layout import plan_layout
from launch.config.load import recipe_from_dict
from launch.config.resolve import resolve
from launch.config.schema import HFModel, Recipe
from launch.ds_json.strict_json import load_json
from launch.ds_json.view import zero_stage
from launch.errors import UserError
from launch.paths import ROOT

NAME = "certificate"
MOST_RANKS = 8  # one host
STEPS = 4
LENGTH = 64
SHORT_LENGTH = 16  # of the parity tests, which have more sequences a step
LEARNING_RATE = 1e-3
LOSS_SCALE = 1024  # fixed: one that moves skips the first steps
LONG, SHORT = 80, 2  # words in a document; a row holds several short ones
CLIP, NO_CLIP = 0.5, 100.0  # half a gradient's norm and less; more than it ever is
CLIPS = {"binding": CLIP, "loose": NO_CLIP, "off": 0.0}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "size": "tiny", "layers": 2, "hidden": 32, "heads": 4, "context": SHORT_LENGTH,
        "position": "learned",
    },
    "llama": {
        "size": "tiny_llama", "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 88,
        "context": SHORT_LENGTH, "position": "rope",
    },
    # One key head, of which each tensor rank has some rows; norms of heads that are whole on each.
    "qwen3": {
        "size": "tiny_llama", "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 1, "ffn": 88,
        "context": SHORT_LENGTH, "position": "rope", "qk_norm": True,
    },
}  # fmt: skip
HF_SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": SHORT_LENGTH,
}  # fmt: skip
HF_FAMILIES: dict[str, dict[str, Any]] = {
    "hf_llama": {"model_type": "llama"},
    "hf_qwen3": {"model_type": "qwen3", "num_key_value_heads": 4},
}

# Buckets and groups that such a model overflows; no parameter stays whole on every rank under ZeRO-3,
# as those below the threshold do; no gigabytes of buffers for NVMe.
SMALL_PARTS = {
    "reduce_bucket_size": 4_000,
    "allgather_bucket_size": 4_000,
    "stage3_prefetch_bucket_size": 4_000,
    "stage3_param_persistence_threshold": 0,
    "sub_group_size": 12_000,
    "offload_param.buffer_size": 20_000,
    "offload_param.buffer_count": 8,
}
# Adam divides a gradient by its own size, and rounding as well: with the usual eps of 1e-8, an element
# whose gradient is nearly zero steps as far as any other, and where rounding turns its sign, in the
# opposite direction. One such element of 32 is past any bound for a sum over the tensor. Gradients are
# about 7e-3 here; with this eps, rounding stays small, and weights also show a gradient that is scaled.
EPS = 1e-3
# The JSON that ships a kind of offload.
OFFLOADS = {
    "optimizer": "zero2_offload_cpu",
    "all": "zero3_offload_cpu",
    "nvme": "zero3_offload_nvme",
}


def write_text(folder: Path, words_each: int = LONG) -> Path:
    """Enough words for every step, the same ones each time, in documents of `words_each`."""
    file = folder / ("text.jsonl" if words_each == LONG else "short.jsonl")
    if not file.exists():
        letters = random.Random(0)
        words = ["".join(letters.choices("abcdefgh", k=letters.randint(2, 7))) for _ in range(60)]
        lines = [
            json.dumps({"text": " ".join(letters.choices(words, k=words_each))})
            for _ in range(60 * LONG // words_each)
        ]
        file.write_text("\n".join(lines))
    return file


def small_parts(zero: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Values for the keys of `SMALL_PARTS` that a `zero_optimization` block has, and swap folders.

    Keys are dotted, below `zero_optimization`.
    """
    found: dict[str, Any] = {}
    for key, value in SMALL_PARTS.items():
        outer, _, inner = key.rpartition(".")
        if inner in (zero.get(outer, {}) if outer else zero):
            found[key] = value
    for outer in ("offload_optimizer", "offload_param"):
        if "nvme_path" in zero.get(outer, {}):
            found[f"{outer}.nvme_path"] = str(folder / "nvme")
    return found


def recipe_values(row: Row, folder: Path) -> dict[str, Any]:
    """A row as a recipe's plain values; `folder` is for its text, its model file and what it swaps."""
    micro = row["micro_batch"]
    return {
        "name": NAME,
        "model": _model(row, folder),
        "data": {
            "source": str(write_text(folder, SHORT if row["documents"] else LONG)),
            "tokenizer": "bytes",
            "sequence_length": LENGTH,
            "document_mask": row["documents"],
            "cache_dir": str(folder / "cache"),
        },
        "parallel": {
            key: row[key] for key in ("tensor", "pipeline", "sequence", "schedule", "partition")
        },
        "train": {
            "steps": STEPS,
            "global_batch_size": row["data"] * row["accumulation"] * micro,
            "micro_batch_size": micro,
            "seed": 1234,
            "schedule": {"warmup_steps": 2, "decay": "cosine"},
            "compile": row["compile"],
        },
        "deepspeed": _deepspeed(row, folder),
    }


def _model(row: Row, folder: Path) -> dict[str, Any]:
    if row["family"] not in HF_FAMILIES:
        changes = {key: row[key] for key in ("layers", "vocab", "tied")}
        given = {**FAMILIES[row["family"]], **changes, "family": "gpt", "context": LENGTH}
        return {**given, "checkpoint_activations": row["checkpointing"]}
    sizes = {
        "num_hidden_layers": row["layers"],
        "vocab_size": row["vocab"],
        "max_position_embeddings": LENGTH,
    }
    config = {
        **HF_SIZES, **HF_FAMILIES[row["family"]], **sizes, "tie_word_embeddings": row["tied"]
    }  # fmt: skip
    tied = "tied" if row["tied"] else "untied"
    file = folder / f"{row['family']}_{row['layers']}_{row['vocab']}_{tied}.json"
    if not file.exists():
        file.write_text(json.dumps(config))
    return {
        "family": "hf",
        "path": str(file),
        "checkpoint_activations": row["checkpointing"],
    }


def _deepspeed(row: Row, folder: Path) -> dict[str, Any]:
    """The shipped JSON of the stage, with the row's precision, offload, sums and clipping.

    Each value is written down as a user would, whether or not the stage takes it.
    """
    file = f"ds_configs/zero{row['stage']}.json"
    zero = dict(_json(file)["zero_optimization"])
    params: dict[str, Any] = {"lr": LEARNING_RATE, "eps": EPS}
    changes: dict[str, Any] = {}
    if row["offload"] != "none":
        shipped = _json(f"ds_configs/{OFFLOADS[row['offload']]}.json")
        for key in ("offload_optimizer", "offload_param"):
            if key in shipped["zero_optimization"]:
                zero[key] = dict(shipped["zero_optimization"][key])
        if "aio" in shipped:
            changes["aio"] = shipped["aio"]
        params |= {"torch_adam": None, "fused": None}  # torch's Adam cannot step on the CPU
    if row["offload"] == "nvme":
        zero["offload_param"]["max_in_cpu"] = 0  # all is swapped
    for key, value in small_parts(zero, folder).items():
        outer, _, inner = key.rpartition(".")
        (zero[outer] if outer else zero)[inner] = value
    return {
        "config": file,
        "gradient_clipping": CLIPS[row["clip"]],
        "optimizer": {"params": params},
        "data_types": {"grad_accum_dtype": "fp32" if row["sums"] == "fp32" else None},
        "zero_optimization": zero,
        **_precision(row["precision"]),
        **changes,
    }


def _precision(name: str) -> dict[str, Any]:
    if name == "fp16":
        return {
            "bf16": None,
            "torch_autocast": None,
            "fp16": {"enabled": True, "loss_scale": LOSS_SCALE},
        }
    autocast = {"enabled": True, "dtype": "bfloat16"} if name == "autocast" else None
    return {"bf16": {"enabled": name == "bf16"}, "torch_autocast": autocast}


@cache
def _json(name: str) -> dict[str, Any]:
    return load_json(ROOT / name)


def planned(row: Row, folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """A row's recipe and its resolved JSON, if the row composes.

    Raises:
        UserError: from the project's own checks, before a rank is started: of the recipe, its
            layout, the JSON, the combination of them, and whether one device can reproduce it.
    """
    from launch.parity.run import check_reproducible
    from launch.parity.weights import uneven_weights

    recipe = recipe_from_dict(recipe_values(row, folder), NAME)
    if ranks(row) > MOST_RANKS:
        raise UserError(f"ranks: the certificate ends at {MOST_RANKS}, the GPUs of one host")
    if row["weights"] == "unequal":
        uneven_weights(recipe)
    ds_config = resolve(recipe, plan_layout(recipe, ranks(row)))
    check_reproducible(ds_config)
    model = json.dumps(recipe.model.model_dump())
    if reason := _why_not_this_model(model, row["tensor"], zero_stage(ds_config)):
        raise UserError(reason)
    return recipe, ds_config


@cache
def _why_not_this_model(model: str, tensor: int, stage: int) -> str | None:
    """What is wrong with a model in itself, or over so many tensor ranks; builds one of family hf."""
    from launch.deepspeed_patches.autotp import check_plan
    from launch.parity.run import check_no_dropout
    from launch.training.build_model import meta_model

    rest = {"data": {"sequence_length": LENGTH}, "deepspeed": {"config": "ds_configs/zero0.json"}}
    train = {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    recipe = recipe_from_dict({"name": NAME, "model": json.loads(model), "train": train, **rest})
    try:
        check_no_dropout(recipe)
        if isinstance(recipe.model, HFModel) and tensor > 1:
            built: Any = meta_model(recipe)
            check_plan(built, tensor, stage)
    except UserError as error:
        return str(error)
    return None


def why_not(row: Row, folder: Path) -> str | None:
    """The reason, in one line, for which a row does not compose; None if it does."""
    try:
        planned(row, folder)
    except UserError as error:
        return str(error).replace(f"{NAME}: ", "")
    return None
