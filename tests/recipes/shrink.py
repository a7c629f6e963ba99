"""Every recipe made small enough to train here, with its own layout, JSON and precision."""

import json
import os
import random
from pathlib import Path
from typing import Any

from launch.config.load import load_recipe
from launch.config.schema import GPTModel, HFModel, Recipe
from launch.paths import ROOT
from scripts.make_tiny_chat import conversation
from tests.recipes.headers import header_ranks

STEPS, SEQUENCE, BATCH = 8, 32, 8
VOCAB = 320  # the byte tokenizer's 257, padded

QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def tiny_hub_model(folder: Path) -> Path:
    """A model folder as the Hub would give it, with weights: what `family: hf` downloads."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(QWEN3))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    return folder


def without_hub(recipe: Recipe, hub_model: Path) -> list[str]:
    """Overrides that put a local folder in the place of a model on the Hub, or of one made before."""
    made = ["data.tokenizer=bytes"] if recipe.data.tokenizer.startswith(".cache/") else []
    return [f"model.path={hub_model}", *made] if isinstance(recipe.model, HFModel) else []


def small_grid(file: Path) -> tuple[int, int, int]:
    """RankInfo, tensor and pipeline size to train a recipe with: a tiny one's own, or two of each axis."""
    recipe = load_recipe(file)
    tensor, pipeline = recipe.parallel.tensor, recipe.parallel.pipeline
    if tensor * pipeline == 1:
        return 2, 1, 1
    if file.stem.startswith("gpt_tiny"):
        return header_ranks(file), tensor, pipeline
    return 4, min(tensor, 2), min(pipeline, 2)


def _micro_batch(recipe: Recipe, data: int, pipeline: int) -> int:
    """More than one accumulation step where the recipe has them; more than the stages in a pipeline."""
    accumulates = recipe.train.global_batch_size > data * recipe.train.micro_batch_size
    micro = 2 if accumulates else 4
    while pipeline > 1 and pipeline * data * micro >= BATCH:
        micro //= 2
    return micro


def shrunken(file: Path, folder: Path, hub_model: Path) -> Recipe:
    """The recipe with few and narrow layers, local text, few steps, and a batch of 8.

    What stays: family and kind of layers, tied or not, recomputed activations, the JSON with all
    the recipe's changes to it, more than one accumulation step where the recipe has them, and which
    kinds of parallelism it has, with its schedule.
    """
    recipe = load_recipe(file)
    ranks, tensor, pipeline = small_grid(file)
    overrides = [
        *without_hub(recipe, hub_model), *_local_data(recipe, folder),
        "data.subset=null", "data.streaming=false", "data.tokenizer=bytes", "data.held_out=0.02",
        f"train.steps={STEPS}", f"train.global_batch_size={BATCH}", "train.compile=false",
        f"train.micro_batch_size={_micro_batch(recipe, ranks // (tensor * pipeline), pipeline)}",
        f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}",
        "train.schedule.warmup_steps=2", "train.eval_every=0", "train.eval_batches=1",
        "checkpoint.every=0", "run.tensorboard=false", "run.sample_tokens=4",
        f"run.dir={folder / 'run'}", "deepspeed.optimizer.params.lr=1.5e-2",
    ]  # fmt: skip
    if isinstance(recipe.model, GPTModel):
        config = recipe.model.shape
        parts = pipeline * recipe.parallel.model_chunks
        overrides += [f"model.layers={max(2, parts)}", "model.hidden=64", "model.heads=4"]
        overrides += [f"model.vocab={VOCAB}"]
        if config.kv_heads != config.heads:
            overrides += ["model.kv_heads=2"]
        if config.ffn != 4 * config.hidden:
            overrides += ["model.ffn=96"]
    zero = json.loads((ROOT / recipe.deepspeed["config"]).read_text())["zero_optimization"]
    return load_recipe(file, [*overrides, *_smaller_buffers(zero, folder)])


def _local_data(recipe: Recipe, folder: Path) -> list[str]:
    if recipe.data.format == "text":
        return ["data.source=python-stdlib", f"data.sequence_length={SEQUENCE}"]
    numbers = random.Random(0)
    rows = [{"messages": conversation(numbers)} for _ in range(100)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"data.source={folder / 'chat.jsonl'}", "data.split=train", "data.sequence_length=128",
        "data.chat_template=recipes/chatml.jinja",
    ]  # fmt: skip


def _smaller_buffers(zero: dict[str, Any], folder: Path) -> list[str]:
    # Sizes of memory, not of the layout: buckets of gigabytes, and a disk of the test's own.
    prefix = "deepspeed.zero_optimization"
    changes = [f"{prefix}.{key}=100000" for key in zero if key.endswith("bucket_size")]
    for block in ("offload_optimizer", "offload_param"):
        if zero.get(block, {}).get("device") == "nvme":
            changes.append(f"{prefix}.{block}.nvme_path={folder / 'nvme'}")
    return changes


def train_recipe(file: Path, folder: Path, hub_model: Path) -> tuple[str, str, str]:
    """One rank's part of a run through the real entry; names the engine's dtype and optimizers."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import deepspeed
    import torch._dynamo

    from launch import train

    # Where the fork server imports Muon, its kernels are marked for compiling; these runs compile nothing.
    torch._dynamo.config.disable = True

    seen: list[tuple[str, str, str]] = []
    initialize = deepspeed.initialize

    def watched(**arguments: object) -> object:
        result = initialize(**arguments)
        engine = result[0]
        dtype = str(next(engine.module.parameters()).dtype)
        kinds = (type(engine.optimizer).__name__, type(engine.basic_optimizer).__name__)
        seen.append((dtype, *kinds))
        return result

    deepspeed.initialize = watched
    train.train(shrunken(file, folder, hub_model), None)
    return seen[0]
