"""The end of a run: final weights, a sample of text, and a summary."""

import json
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from launch.checkpoint.safetensors_io import save_weights
from launch.config.schema import HFModel, Recipe
from launch.data.prepare import Corpus
from launch.ds_json.view import training_dtype
from launch.runtime.console import say
from launch.runtime.process_group import RankInfo
from launch.runtime.run_dir import RunDir
from launch.training.evaluate import next_token_logits
from launch.training.metrics import perplexity
from launch.training.sampling import sample


def finish(
    recipe: Recipe,
    ds_config: dict[str, Any],
    engine: DeepSpeedEngine,
    run: RunDir,
    corpus: Corpus,
    ranks: RankInfo,
    validation_loss: float,
) -> None:
    """Write and report model*.safetensors, sample.txt and summary.json. Every rank calls it.

    With `model.lora`, the adapter is written as well, and merged into the weights.
    """
    if isinstance(recipe.model, HFModel) and recipe.model.lora is not None:
        from launch.training.lora import merge_adapters, save_adapter

        say(f"adapter: {save_adapter(engine, run.path)}; the weights have it merged")
        merge_adapters(engine)
    files = save_weights(engine, run.path, training_dtype(ds_config))
    say(
        f"validation loss: {validation_loss:.4f} nats per token (perplexity "
        f"{perplexity(validation_loss):.2f})"
    )
    say(f"weights: {', '.join(str(file) for file in files)}")
    if recipe.run.sample_tokens:
        text = _sample(recipe, engine, corpus, ranks)
        if ranks.is_main:
            (run.path / "sample.txt").write_text(text)
        say(f"sample:\n{text}\n")
    if ranks.is_main:
        summary = {"steps": recipe.train.steps, "validation_loss": validation_loss}
        run.summary.write_text(json.dumps(summary) + "\n")


def _sample(recipe: Recipe, engine: DeepSpeedEngine, corpus: Corpus, ranks: RankInfo) -> str:
    context = recipe.data.sequence_length
    return sample(
        lambda tokens: next_token_logits(engine, tokens, context),
        corpus.tokenizer,
        recipe.run.sample_prompt,
        recipe.run.sample_tokens,
        context,
        ranks.device,
    )
