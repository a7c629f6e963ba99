"""Every recipe: how it is written, what it says it is, and that it trains in its own layout."""

import math
import re
import shlex
from pathlib import Path

import pytest
import torch

from launch.build import build_model, compute_dtype
from launch.describe import header, print_dry_run
from launch.ds_config import resolve
from launch.layout import plan_layout
from launch.metrics import read_metrics
from launch.recipe import ROOT, GPTModel, HFModel, load_recipe
from launch.weights import canonical_names
from models.config import count_parameters
from tests.ranks import run_ranks
from tests.recipes.shrink import RANKS, STEPS, tiny_hub_model, train_recipe, without_hub

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
README = ROOT / "recipes" / "README.md"
TINY = (
    "zero0", "zero1", "zero2", "zero3", "zero2_offload_cpu", "zero3_offload_cpu",
    "zero3_offload_nvme",
)  # fmt: skip

each_recipe = pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)


@pytest.fixture(scope="session")
def hub_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hub_model(tmp_path_factory.mktemp("hub") / "tiny-qwen3")


def header_commands(file: Path) -> list[list[str]]:
    return [shlex.split(line) for line in header(file) if line.startswith("deepspeed ")]


def header_ranks(file: Path) -> int:
    """The number of ranks that a recipe's own command starts."""
    command = header_commands(file)[0]
    return int(command[command.index("--num_gpus") + 1])


def test_the_promised_recipes_exist() -> None:
    names = {file.stem for file in RECIPES}
    assert {f"gpt_tiny_{stem}" for stem in TINY} <= names
    for size in ("gpt_124m", "gpt_1b3", "gpt_2b7", "gpt_6b7", "llama3_8b", "hf_qwen3"):
        assert any(name.startswith(size) for name in names), size


@each_recipe
def test_the_header_says_what_where_and_how(file: Path) -> None:
    lines = header(file)
    what = lines[0]
    assert what.endswith((".", ").")) and 40 < len(what) < 200
    assert re.search(r"\d\s*GPUs? of \d+ GiB|CPU", what), "the first line names the hardware"
    first, second = header_commands(file)
    path = f"recipes/{file.name}"
    assert first[:2] == ["deepspeed", "--num_gpus"]
    assert first[3:] == ["launch/train.py", "--config", path]
    assert second[: len(first)] == first and second[len(first)] == "--set"
    overrides = [part for part in second[len(first) :] if part != "--set"]
    assert overrides
    load_recipe(file, overrides)
    # In a GPU recipe every number of memory or speed is marked as what it is.
    if "GPU" in what:
        assert re.search("estimate|measured", " ".join(lines))


@each_recipe
def test_it_is_short_and_named_by_its_layout(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 45
    recipe = load_recipe(file)
    stem = Path(recipe.deepspeed["config"]).stem
    assert file.stem.endswith(f"_{stem}")
    assert (ROOT / recipe.deepspeed["config"]).is_file()
    size = file.stem.removesuffix(f"_{stem}")
    if isinstance(recipe.model, GPTModel):
        assert size in (f"gpt_{recipe.model.size}", recipe.model.size)
    else:
        assert size.startswith("hf_")


@each_recipe
def test_its_batch_divides_on_its_hardware(file: Path) -> None:
    recipe = load_recipe(file)
    smallest = int(re.findall(r"(\d+)(?: to \d+)? GPUs?", header(file)[0] + "1 GPU")[0])
    for ranks in {smallest, header_ranks(file)}:
        assert plan_layout(recipe, ranks).world_size == ranks


@each_recipe
def test_dry_run(file: Path, hub_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(file)
    recipe = load_recipe(file, without_hub(recipe, hub_model))
    ranks = header_ranks(file)
    print_dry_run(recipe, ranks)
    printed = capsys.readouterr().out
    assert f"# recipe {file.stem}, resolved" in printed
    assert f"layout: {ranks} ranks = pipeline 1 x data {ranks} x tensor 1; global batch " in printed
    assert f'"train_batch_size": {recipe.train.global_batch_size}' in printed
    assert f"in {recipe.train.steps} steps" in printed
    if isinstance(recipe.model, GPTModel):
        assert f"parameters: {count_parameters(recipe.model.gpt_config()):,} (" in printed


@each_recipe
def test_tiny_ones_compute_in_fp32_and_the_others_in_bf16(file: Path) -> None:
    # In bf16, a CPU without the units for it takes ten times as long.
    recipe = load_recipe(file)
    ds_config = resolve(recipe, plan_layout(recipe, header_ranks(file)))
    tiny = file.stem.startswith("gpt_tiny")
    assert compute_dtype(ds_config) is (torch.float32 if tiny else torch.bfloat16)


@each_recipe
def test_the_whole_model_on_the_meta_device(file: Path, hub_model: Path) -> None:
    recipe = load_recipe(file)
    recipe = load_recipe(file, without_hub(recipe, hub_model))
    model = build_model(recipe, torch.bfloat16, "meta")
    parameters = canonical_names(model)
    assert all(p.device.type == "meta" for p in parameters.values())
    if isinstance(recipe.model, HFModel):
        assert len(parameters) > 10
        return
    found = sum(p.numel() for p in parameters.values())
    assert found == count_parameters(recipe.model.gpt_config())


@each_recipe
def test_it_trains_in_its_own_layout(
    file: Path, hub_model: Path, tmp_path: Path, built_ops: tuple[str, ...]
) -> None:
    ranks = run_ranks(train_recipe, RANKS, file, tmp_path, hub_model)
    tiny = file.stem.startswith("gpt_tiny")
    assert {dtype for dtype, _, _ in ranks} == {"torch.float32" if tiny else "torch.bfloat16"}
    stage = re.search(r"_zero(\d)", file.stem)
    assert stage
    assert (
        ranks[0][1]
        == {
            "0": "AdamW",
            "1": "DeepSpeedZeroOptimizer" if tiny else "BF16_Optimizer",
            "2": "DeepSpeedZeroOptimizer",
            "3": "DeepSpeedZeroOptimizer_Stage3",
        }[stage[1]]
    )
    assert ranks[0][2] == ("DeepSpeedCPUAdam" if "offload" in file.stem else "AdamW")
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    losses = [record["loss"] for record in records]
    assert len(losses) == STEPS
    assert all(math.isfinite(record[key]) for record in records for key in ("loss", "grad_norm"))
    # From log(320) = 5.8, the loss of guessing, to well below: the bytes' frequencies at least.
    assert losses[0] == pytest.approx(math.log(320), abs=0.3)
    assert sum(losses[-3:]) / 3 < losses[0] - 1.0
    assert list((tmp_path / "run").glob("model*.safetensors"))
    assert not list((tmp_path / "nvme").glob("*/*")), "swap files are left behind"


def test_the_table_lists_exactly_the_recipes() -> None:
    rows = [line for line in README.read_text().splitlines() if line.startswith("| `")]
    listed = [re.findall(r"^\| `(\w+)`", row)[0] for row in rows]
    assert sorted(listed) == [file.stem for file in RECIPES]
    for row, name in zip(rows, listed, strict=True):
        recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
        if isinstance(recipe.model, GPTModel):
            millions = count_parameters(recipe.model.gpt_config()) / 1e6
            stated = re.search(r"\| ([\d.]+)([MB]) \|", row)
            assert stated, row
            factor = {"M": 1.0, "B": 1000.0}[stated[2]]
            assert float(stated[1]) * factor == pytest.approx(millions, rel=0.01), row
