"""Every recipe: how it is written, what it says it is, and that it trains in its own layout."""

import math
import re
from pathlib import Path

import pytest
import torch

from launch.checkpoint.full_weights import canonical_names
from launch.config.layout import plan_layout
from launch.config.load import load_recipe
from launch.config.resolve import resolve
from launch.config.schema import GPTModel, HFModel, Recipe
from launch.ds_json.view import compute_dtype
from launch.memory.estimate import estimate
from launch.paths import ROOT
from launch.planner.dry_run import header, print_dry_run, print_list
from launch.runtime.run_dir import read_metrics
from launch.training.build_model import build_model
from models.config import count_parameters
from tests.ranks import run_ranks
from tests.recipes.headers import header_commands, header_ranks, stated_gpus
from tests.recipes.shrink import (
    STEPS,
    shrunken,
    small_grid,
    tiny_hub_model,
    train_recipe,
    without_hub,
)
from tests.selection import representatives

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
README = ROOT / "recipes" / "README.md"
TINY = (
    "zero0", "zero1", "zero2", "zero3", "zero2_offload_cpu", "zero3_offload_cpu",
    "zero3_offload_nvme", "tp2_zero1", "tp2_zero3", "pp2_zero1", "pp2_gpipe_zero1", "pp4_zero1",
    "pp4_zb_zero1", "pp2_interleaved_zero1", "pp2_tp2_zero1", "3d_zero1",
)  # fmt: skip
PARALLEL = (
    "gpt_6b7_tp2", "gpt_20b_pp4_tp2", "llama3_8b_tp2", "llama3_70b_pp4_tp8", "gpt_175b_pp16_tp8",
)  # fmt: skip

each_recipe = pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)


@pytest.fixture(scope="session")
def hub_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hub_model(tmp_path_factory.mktemp("hub") / "tiny-qwen3")


def is_parallel(recipe: Recipe) -> bool:
    return recipe.parallel.tensor * recipe.parallel.pipeline > 1


def test_the_promised_recipes_exist() -> None:
    names = {file.stem for file in RECIPES}
    assert {f"gpt_tiny_{stem}" for stem in TINY} <= names
    assert {"hf_tiny_sft_zero2", "hf_tiny_lora_zero3"} <= names
    for size in ("gpt_124m", "gpt_1b3", "gpt_2b7", "gpt_6b7", "llama3_8b", "hf_qwen3", *PARALLEL):
        assert any(name.startswith(size) for name in names), size


@each_recipe
def test_the_header_says_what_where_and_how(file: Path) -> None:
    lines = header(file)
    what = lines[0]
    assert what.endswith((".", ").")) and 40 < len(what) < 200
    assert re.search(r"\d\s*GPUs? of \d+ GiB|CPU", what), "the first line names the hardware"
    first, second = header_commands(file)
    path = f"recipes/{file.name}"
    assert first[0] == "deepspeed"
    assert first[3:] == ["launch/train.py", "--config", path]
    if header_ranks(file) <= 8:  # one host
        assert first[1] == "--num_gpus"
    else:
        assert first[1:3] == ["--hostfile", "hosts.txt"]
        assert any("host" in line for line in lines[1:] if not line.startswith("deepspeed "))
    assert second[: len(first)] == first and second[len(first)] == "--set"
    overrides = [part for part in second[len(first) :] if part != "--set"]
    assert overrides
    load_recipe(file, overrides)
    # In a GPU recipe every number of memory or speed is marked as what it is.
    if "GPU" in what:
        assert re.search("estimate|measured", " ".join(lines))


def layout_names(file: Path) -> list[str]:
    """What a recipe's optimizer and parallel block may be called in its name."""
    parallel = load_recipe(file).parallel
    stages = f"_pp{parallel.pipeline}" if parallel.pipeline > 1 else ""
    order = f"_{parallel.schedule.partition('-')[0]}" if parallel.schedule != "1f1b" else ""
    tensor = f"_tp{parallel.tensor}" if parallel.tensor > 1 else ""
    kind = load_recipe(file).deepspeed.get("optimizer", {}).get("type", "AdamW")
    optimizer = f"_{kind.lower()}" if kind != "AdamW" else ""
    names = [optimizer + stages + order + tensor]
    data = header_ranks(file) // (parallel.tensor * parallel.pipeline)
    if min(parallel.tensor, parallel.pipeline, data) > 1:
        names.append("_3d")
    return names


@each_recipe
def test_it_is_short_and_named_by_its_layout(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 45
    recipe = load_recipe(file)
    stem = Path(recipe.deepspeed["config"]).stem
    assert file.stem.endswith(f"_{stem}")
    assert (ROOT / recipe.deepspeed["config"]).is_file()
    name = file.stem.removesuffix(f"_{stem}")
    if isinstance(recipe.model, GPTModel):
        size = recipe.model.size
        assert name in {
            f"{s}{layout}" for s in (f"gpt_{size}", size) for layout in layout_names(file)
        }
    else:
        assert name.startswith("hf_")


@each_recipe
def test_its_batch_divides_on_its_hardware(file: Path) -> None:
    recipe = load_recipe(file)
    stated = stated_gpus(file) or (header_ranks(file) if is_parallel(recipe) else 1,)
    for ranks in {*stated, header_ranks(file)}:
        layout = plan_layout(recipe, ranks)
        assert layout.grid.world_size == ranks
        if layout.grid["pipeline"] > 1:
            # With m micro batches, (p - 1) / (m + p - 1) of a step is idle: 11% at m = 8 p.
            assert layout.accumulation >= layout.grid["pipeline"] * (8 if stated_gpus(file) else 2)


@each_recipe
def test_the_memory_in_the_header_is_the_estimate(file: Path) -> None:
    recipe = load_recipe(file)
    found = re.search(r"\(estimate: (\d+) GiB on (\d+)\)", header(file)[0])
    if not is_parallel(recipe) or stated_gpus(file) is None:
        return  # those have been measured, or count buckets too
    assert found, "the first line says (estimate: X GiB on N)"
    layout = plan_layout(recipe, int(found[2]))
    total = estimate(recipe, layout, resolve(recipe, layout)).total
    assert float(found[1]) == pytest.approx(total, rel=0.1)
    room = re.search(r"GPUs of (\d+) GiB", header(file)[0])
    stated = stated_gpus(file)
    assert room and stated
    for ranks in stated:
        layout = plan_layout(recipe, ranks)
        total = estimate(recipe, layout, resolve(recipe, layout)).total
        assert total < 0.9 * float(room[1]), f"{ranks} GPUs: {total:.1f} GiB leaves no room"


@each_recipe
def test_dry_run(file: Path, hub_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(file, without_hub(load_recipe(file), hub_model))
    ranks = header_ranks(file)
    print_dry_run(recipe, ranks)
    printed = capsys.readouterr().out
    assert f"# recipe {file.stem}, resolved" in printed
    tensor, pipeline = recipe.parallel.tensor, recipe.parallel.pipeline
    data = ranks // (tensor * pipeline)
    assert (
        f"layout: {ranks} ranks = pipeline {pipeline} x data {data} x tensor {tensor}; global batch "
    ) in printed
    assert f'"train_batch_size": {recipe.train.global_batch_size}' in printed
    assert f"in {recipe.train.steps} steps" in printed
    if isinstance(recipe.model, GPTModel):
        assert f"parameters: {count_parameters(recipe.model.shape):,} (" in printed
        zero = resolve(recipe, plan_layout(recipe, ranks))["zero_optimization"]
        # Several ranks keep small weights on the device; one keeps none that are offloaded.
        first = "gradients" if "offload_param" in zero and ranks == 1 else "weights"
        assert re.search(rf"^memory per rank \(estimate\): [\d.]+ GiB = {first} ", printed, re.M)


@each_recipe
def test_tiny_ones_compute_in_fp32_and_the_others_in_bf16(file: Path) -> None:
    # In bf16, a CPU without the units for it takes ten times as long.
    recipe = load_recipe(file)
    ds_config = resolve(recipe, plan_layout(recipe, header_ranks(file)))
    tiny = "_tiny_" in file.stem
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
    assert found == count_parameters(recipe.model.shape)


def layout_kind(recipe: Recipe) -> dict[str, object]:
    """The parallel block, but for how many ranks each kind of parallelism has."""
    sizes = ("tensor", "pipeline")
    return {key: value > 1 if key in sizes else value for key, value in recipe.parallel}


def training_kinds(file: Path) -> set[object]:
    """Every tiny recipe is of a kind of its own; the others are of their model and their axes.

    A transformers model is the same in chat, and with adapters another.
    """
    if file.stem.startswith("gpt_tiny"):
        return {file.stem}
    recipe = load_recipe(file)
    tensor, pipeline = recipe.parallel.tensor > 1, recipe.parallel.pipeline > 1
    adapters = isinstance(recipe.model, HFModel) and recipe.model.lora is not None
    return {
        file.stem.partition("_")[0],
        (tensor, pipeline),
        ("adapters", adapters),
        recipe.data.format,
    }


@pytest.mark.parametrize(
    "file", representatives(RECIPES, training_kinds), ids=lambda file: file.stem
)
def test_it_trains_in_its_own_layout(
    file: Path, hub_model: Path, tmp_path: Path, built_ops: tuple[str, ...]
) -> None:
    small, world_size = shrunken(file, tmp_path, hub_model), small_grid(file)[0]
    assert layout_kind(small) == layout_kind(load_recipe(file))
    layout = plan_layout(small, world_size)
    assert layout.grid["pipeline"] == 1 or layout.accumulation > layout.grid["pipeline"]
    ranks = run_ranks(train_recipe, world_size, file, tmp_path, hub_model)
    tiny = "_tiny_" in file.stem
    assert {dtype for dtype, _, _ in ranks} == {"torch.float32" if tiny else "torch.bfloat16"}
    stage = re.search(r"_zero(\d)", file.stem)
    assert stage
    assert (
        ranks[0][1]
        == {
            "0": ranks[0][2],
            "1": "DeepSpeedZeroOptimizer" if tiny else "BF16_Optimizer",
            "2": "DeepSpeedZeroOptimizer",
            "3": "DeepSpeedZeroOptimizer_Stage3",
        }[stage[1]]
    )
    muon = "MuonWithAuxAdam" if "_muon" in file.stem else "AdamW"
    assert ranks[0][2] == ("DeepSpeedCPUAdam" if "offload" in file.stem else muon)
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    losses = [record["loss"] for record in records]
    assert len(losses) == STEPS
    assert all(math.isfinite(record[key]) for record in records for key in ("loss", "grad_norm"))
    # From log(320) = 5.8, the loss of guessing, to well below: the bytes' frequencies at least. A tied
    # embedding guesses the token that it sees: right for blanks, of which some Pythons' text has more.
    assert losses[0] == pytest.approx(math.log(320), abs=0.5)
    # Adapters beside random weights, the embedding among them, learn little.
    adapters = isinstance(small.model, HFModel) and small.model.lora is not None
    assert sum(losses[-3:]) / 3 < losses[0] - (0.1 if adapters else 1.0)
    assert list((tmp_path / "run").glob("model*.safetensors"))
    assert not list((tmp_path / "nvme").glob("*/*")), "swap files are left behind"


def test_the_table_lists_exactly_the_recipes() -> None:
    rows = [line for line in README.read_text().splitlines() if line.startswith("| `")]
    listed = [re.findall(r"^\| `(\w+)`", row)[0] for row in rows]
    assert sorted(listed) == [file.stem for file in RECIPES]
    for row, name in zip(rows, listed, strict=True):
        recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
        if isinstance(recipe.model, GPTModel):
            millions = count_parameters(recipe.model.shape) / 1e6
            stated = re.search(r"\| ([\d.]+)([MB]) \|", row)
            assert stated, row
            factor = {"M": 1.0, "B": 1000.0}[stated[2]]
            assert float(stated[1]) * factor == pytest.approx(millions, rel=0.01), row


def test_the_list_names_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    print_list()
    printed = capsys.readouterr().out.splitlines()
    lines = {line.split()[0]: line for line in printed if line[1:2].strip()}  # not continued ones
    assert lines.keys() >= {file.stem for file in RECIPES}
    for file in RECIPES:
        parallel = load_recipe(file).parallel
        for axis, size in (("tensor", parallel.tensor), ("pipeline", parallel.pipeline)):
            assert (f"{axis} {size}" in lines[file.stem]) == (size > 1), lines[file.stem]
        assert ("(sequence)" in lines[file.stem]) == parallel.sequence
        assert ("(gpipe)" in lines[file.stem]) == (parallel.schedule == "gpipe")
