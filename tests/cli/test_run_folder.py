"""What a run leaves behind, and that a person can use it."""

import json
import math
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from launch.config.layout import plan_layout
from launch.config.load import recipe_from_dict
from launch.config.resolve import resolve
from launch.config.schema import GPTModel
from launch.ds_json.strict_json import load_json
from launch.paths import ROOT
from launch.runtime.run_dir import read_metrics, read_settings
from launch.training.metrics import draw_loss
from models.config import count_parameters
from tests.cli.commands import run, run_forked
from tests.resume.runs import STEPS, train, values, write_text

FIELDS = {
    "step", "tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second",
    "tflops_per_device", "mfu", "seconds", "memory_gib",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two ranks."""
    path = tmp_path_factory.mktemp("run-folder")
    write_text(path / "text")
    train(_recipe(path))
    return path / "run"


def _recipe(path: Path) -> dict[str, Any]:
    plain = values(path, config="ds_configs/zero2.json", bf16={"enabled": False})
    return {**plain, "run": {**plain["run"], "tensorboard": True, "sample_tokens": 8}}


def test_the_settings_are_those_that_ran(folder: Path) -> None:
    recipe = recipe_from_dict(_recipe(folder.parent))
    assert read_settings(folder) == recipe
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["train"]["seed"] == 1234
    assert load_json(folder / "deepspeed.json") == resolve(recipe, plan_layout(recipe, 2))


def test_the_environment_is_told(folder: Path) -> None:
    told = json.loads((folder / "environment.json").read_text())
    assert told["world_size"] == 2
    assert told["versions"]["torch"] == torch.__version__
    assert told["devices"] == ["cpu"]
    assert told["earlier"] == []
    assert {"commit", "host", "python", "started", "command"} <= set(told)


def test_metrics_has_each_step_once(folder: Path) -> None:
    records = read_metrics(folder / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert all(set(record) == FIELDS for record in steps)
    assert steps[-1]["tokens"] == STEPS * 8 * 32
    assert all(r["grad_norm"] > 0 and r["tokens_per_second"] > 0 for r in steps)
    assert [r["step"] for r in records if "validation_loss" in r] == [2, 4, 5]
    last = records[-1]
    assert last["perplexity"] == pytest.approx(math.exp(last["validation_loss"]))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == {"steps": STEPS, "validation_loss": records[-1]["validation_loss"]}


def test_tensorboard_has_the_same_numbers(folder: Path) -> None:
    # By name: the package has no type information.
    reader: Any = import_module("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    steps = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    logged = [(e.step, e.value) for e in events.Scalars("loss")]
    assert logged == [(r["step"], pytest.approx(r["loss"])) for r in steps]
    assert {"grad_norm", "learning_rate", "validation_loss"} <= set(events.Tags()["scalars"])


def test_the_loss_curve_is_a_picture(folder: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    picture = imread(folder / "loss.png")
    assert picture.shape[0] > 300
    assert picture.shape[1] > 600
    assert picture.std() > 0.01  # something is drawn
    records = read_metrics(folder / "metrics.jsonl")
    draw_loss([r for r in records if "loss" not in r], tmp_path / "none.png", "nothing")
    assert not (tmp_path / "none.png").exists()


def test_the_weights_are_whole(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    model = read_settings(folder).model
    assert isinstance(model, GPTModel)
    config = model.shape
    assert sum(w.numel() for w in weights.values()) == count_parameters(config)
    assert all(w.dtype == torch.float32 for w in weights.values())


def test_generate_prints_text_from_it(folder: Path) -> None:
    script = ROOT / "scripts/generate.py"
    words = ["--tokens", "30", "--prompt", "document 7", "--seed"]
    command: list[str | Path] = [script, folder, *words]
    first = run([sys.executable, *command, "1"])
    again, other = (run_forked([*command, seed]) for seed in ("1", "2"))
    assert first.code == again.code == other.code == 0, first.output
    assert "document 7" in first.output
    assert _text(first.output) == _text(again.output)
    assert _text(first.output) != _text(other.output)


def _text(output: str) -> str:
    return output[output.index("document 7") :]


def test_a_transformers_model_loads_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_text(tmp_path / "text")
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64,
             "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "max_position_embeddings": 32}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    plain = values(tmp_path, config="ds_configs/zero3.json", bf16={"enabled": False})
    plain["model"] = {"family": "hf", "path": str(tmp_path / "config.json")}
    train(plain)

    folder = tmp_path / "run"
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    saved = load_file(folder / "model.safetensors")
    assert torch.equal(model.model.embed_tokens.weight, saved["model.embed_tokens.weight"])
    assert model.config.num_key_value_heads == 1
