"""launch/config/load.py: what a recipe may say, and one helpful line for what it may not."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launch.config.load import load_recipe, recipe_from_dict
from launch.config.schema import GPTModel, HFModel, Recipe
from launch.errors import UserError

GOOD = """\
# A recipe for this test.
model: {family: gpt, size: tiny}
data: {source: python-stdlib, tokenizer: bytes, sequence_length: 64}
train: {steps: 5, global_batch_size: 4, micro_batch_size: 2}
deepspeed:
  config: ds_configs/zero1.json
  optimizer: {params: {lr: 1e-3}}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    file = tmp_path / "my_recipe.yaml"
    file.write_text(GOOD)
    return file


def rejection(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(file, overrides)
    message = str(caught.value)
    assert "\n" not in message.strip()
    return message


def test_reads_with_defaults(good: Path) -> None:
    recipe = load_recipe(good)
    assert recipe.name == "my_recipe"
    assert isinstance(recipe.model, GPTModel)
    assert recipe.model.shape.hidden == 128
    assert recipe.train.seed == 1234
    assert recipe.train.schedule.decay == "cosine"
    assert recipe.parallel.tensor == recipe.parallel.pipeline == 1
    assert recipe.checkpoint.every == 0
    assert recipe.run.dir is None
    # YAML 1.1 readers take 1e-3 for text.
    assert recipe.deepspeed["optimizer"]["params"]["lr"] == 0.001


def test_is_frozen(good: Path) -> None:
    recipe = load_recipe(good)
    with pytest.raises(ValidationError):
        recipe.train.steps = 7


def test_survives_the_run_folder(good: Path) -> None:
    recipe = load_recipe(good, ["model.layers=3"])
    assert recipe_from_dict(recipe.model_dump()) == recipe


def test_overrides_reach_every_block(good: Path) -> None:
    recipe = load_recipe(
        good,
        [
            "train.steps=30",
            "train.schedule.warmup_steps=3",
            "model.hidden=64",
            "deepspeed.optimizer.params.lr=3e-4",
            "deepspeed.zero_optimization.overlap_comm=false",
            "data.source=[a.txt, b.txt]",
            "run.dir=/somewhere/a=b",
            "run.dir=/somewhere/else",
        ],
    )
    assert recipe.train.steps == 30
    assert recipe.train.schedule.warmup_steps == 3
    assert isinstance(recipe.model, GPTModel)
    assert recipe.model.shape.ffn == 256
    assert recipe.deepspeed["optimizer"]["params"]["lr"] == 3e-4
    assert recipe.deepspeed["zero_optimization"] == {"overlap_comm": False}
    assert recipe.deepspeed["config"] == "ds_configs/zero1.json"
    assert recipe.data.source == ["a.txt", "b.txt"]
    assert recipe.run.dir == "/somewhere/else"


def test_a_value_may_hold_an_equals_sign(good: Path) -> None:
    assert load_recipe(good, ["run.dir=/somewhere/a=b"]).run.dir == "/somewhere/a=b"


def test_null_takes_a_value_back(good: Path) -> None:
    recipe = load_recipe(good, ["run.dir=x", "run.dir=null", "deepspeed.gradient_clipping=null"])
    assert recipe.run.dir is None
    assert recipe.deepspeed["gradient_clipping"] is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stesp=3", "unknown key train.stesp; did you mean 'steps'?"),
        ("trian.steps=3", "unknown key trian; did you mean 'train'?"),
        ("model.hiden=3", "unknown key model.hiden; did you mean 'hidden'?"),
        (
            "train.schedule.warmup=3",
            "unknown key train.schedule.warmup; did you mean 'warmup_steps'",
        ),
        (
            "data.zzzzzz=3",
            "unknown key data.zzzzzz; choose from: cache_dir, chat_template, document_mask",
        ),
        ("model.family=gtp", "model: Input tag 'gtp' found using 'family' does not match"),
        ("model.size=tinny", "model.size: 'tinny' is not known; did you mean 'tiny'?"),
        ("model.size=null", "model: give size, or all of: layers, hidden, heads, vocab, context"),
        ("model.heads=5", "model: hidden 128 is not a multiple of heads 5"),
        ("train.steps=0", "train.steps: Input should be greater than 0, but it is 0"),
        ("train.steps=many", "train.steps: Input should be a valid integer"),
        ("train.steps=1.5", "train.steps: Input should be a valid integer"),
        ("train.seed=-1", "train.seed: Input should be greater than or equal to 0, but it is -1"),
        (
            "train.schedule.decay=sine",
            "train.schedule.decay: Input should be 'constant', 'linear' or",
        ),
        (
            "train.schedule.min_ratio=2",
            "min_ratio: Input should be less than or equal to 1, but it is 2",
        ),
        ("data.held_out=1.0", "data.held_out: Input should be less than 1, but it is 1.0"),
        ("checkpoint.keep=0", "checkpoint.keep: Input should be greater than 0, but it is 0"),
        ("train=3", "train: Input should be"),
        (
            "data.sequence_length=512",
            "data.sequence_length: 512 is more than the model's context of 256; lower it, or raise "
            "model.context",
        ),
        (
            "parallel.tensor=3",
            "parallel.tensor: 3 ranks do not divide the model's 4 heads, 4 key/value heads of 32, and "
            "ffn of 512; use 2 or 4",
        ),
        (
            "parallel.pipeline=9",
            "parallel.pipeline: 9 stages are more than the model's 4 layers; use 4 or fewer",
        ),
        (
            "parallel.schedule=gpipe",
            "parallel.schedule: it orders a pipeline, and parallel.pipeline is",
        ),
        (
            "parallel.partition=uniform",
            "parallel.partition: it orders a pipeline, and parallel.pipeline",
        ),
        (
            "parallel.sequence=true",
            "parallel.sequence: it shards the sequence over the tensor ranks",
        ),
        (
            "parallel.schedule=zigzag",
            "parallel.schedule: Input should be '1f1b', 'interleaved', 'zb-h1', 'gpipe' or 'naive'",
        ),
        ("deepspeed.config=null", "deepspeed.config: name a JSON file, for example ds_configs/"),
        ("train.steps", "--set train.steps: write key=value, for example train.steps=30"),
        ("=3", "--set =3: write key=value, for example train.steps=30"),
    ],
)
def test_what_is_wrong_is_named(good: Path, override: str, expected: str) -> None:
    assert expected in rejection(good, override)


def test_each_refusal_names_the_file(good: Path) -> None:
    assert rejection(good, "train.stesp=3").startswith(f"{good}: ")
    assert rejection(good, "model.heads=5").startswith(f"{good}: ")


def test_several_mistakes_are_counted(good: Path) -> None:
    assert rejection(good, "train.stesp=3", "train.seed=-1").endswith("(and 1 more)")


def test_a_missing_key_is_named(good: Path) -> None:
    good.write_text(GOOD.replace("steps: 5, ", ""))
    assert rejection(good) == f"{good}: train.steps is missing"
    good.write_text(
        GOOD.replace("train: {steps: 5, global_batch_size: 4, micro_batch_size: 2}\n", "")
    )
    assert rejection(good) == f"{good}: train is missing"


def test_a_missing_file_names_the_nearest_recipe() -> None:
    message = rejection(Path("recipes/gpt_tiny_zero22.yaml"))
    assert message.startswith(
        "--config: no recipe file recipes/gpt_tiny_zero22.yaml; did you mean "
    )
    assert "gpt_tiny_zero2" in message


def test_an_item_of_a_list_is_overridden_and_one_that_is_none_is_told(good: Path) -> None:
    betas = "deepspeed.optimizer.params.betas"
    recipe = load_recipe(good, [f"{betas}=[0.9,0.99]", f"{betas}.1=0.95"])
    assert recipe.deepspeed["optimizer"]["params"]["betas"] == [0.9, 0.95]
    for wrong in (f"{betas}.x=1", f"{betas}.5=1", f"{betas}={{a: 1}}"):
        with pytest.raises(UserError, match=re.escape(wrong)):
            load_recipe(good, [f"{betas}=[0.9,0.99]", wrong])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {size: tiny", "not readable as YAML"),
        ("- a\n- list\n", "a recipe is a mapping of blocks (model:, data:, train:, ...)"),
        ("just words\n", "model is missing (and 4 more)"),
        ("", "model is missing"),
        (GOOD + "train: {steps: 9}\n", "found duplicate key train"),
        (GOOD + "run: {dir: '${no.such.key}'}\n", "Interpolation key 'no.such.key' not found"),
    ],
)
def test_a_file_that_is_no_recipe(good: Path, text: str, expected: str) -> None:
    good.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(good)
    assert str(good) in str(caught.value)
    assert expected in str(caught.value)


def test_a_file_that_is_no_text(good: Path) -> None:
    good.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="not readable as YAML"):
        load_recipe(good)


def test_family_hf(good: Path) -> None:
    text = GOOD.replace("{family: gpt, size: tiny}", "{family: hf, path: Qwen/Qwen3-0.6B}")
    good.write_text(text)
    recipe = load_recipe(good, ["model.changes.num_hidden_layers=2"])
    assert isinstance(recipe.model, HFModel)
    assert recipe.model.changes == {"num_hidden_layers": 2}
    assert not recipe.model.pretrained
    assert "unknown key model.size; choose from: changes, checkpoint_act" in rejection(
        good, "model.size=tiny"
    )


def test_family_may_be_left_out() -> None:
    values: dict[str, Any] = {
        "name": "x",
        "model": {"size": "tiny"},
        "data": {"sequence_length": 64},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        "deepspeed": {"config": "ds_configs/zero1.json"},
    }
    recipe: Recipe = recipe_from_dict(values)
    assert recipe.model.family == "gpt"
    with pytest.raises(UserError, match=r"^here: unknown key model\.sise; did you mean 'size'"):
        recipe_from_dict({**values, "model": {"sise": "tiny"}}, where="here")
