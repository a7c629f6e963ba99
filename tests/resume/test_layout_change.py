"""A run saved in one layout goes on in any other: with the same state to the bit, and the same losses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.config.load import recipe_from_dict
from launch.parity.compare import tolerances
from tests.parity.hf_cases import MODELS, SIZES, WHOLE_MODELS
from tests.parity.sft_cases import LORA, saved_llama
from tests.ranks import run_ranks
from tests.resume.layouts import (
    AFTER,
    BEFORE,
    LAYERS,
    LAYOUTS,
    load_each,
    recipe,
    same,
    save_then_train,
    saved,
    whole_state,
)
from tests.resume.runs import write_text

BOUND = tolerances(torch.float32, layers=LAYERS).loss


def _save(tmp_path: Path, name: str, **model: Any) -> tuple[Path, list[float]]:
    folder = tmp_path / name
    losses = run_ranks(
        save_then_train, LAYOUTS[name].ranks, recipe(tmp_path, name, **model), folder
    )
    return saved(folder), losses[0]


def test_a_cycle_through_all_layouts_ends_with_the_bits_it_began_with(
    tmp_path: Path, built_ops: object
) -> None:
    write_text(tmp_path / "text")
    checkpoint, _ = _save(tmp_path, "one device")
    began = whole_state(checkpoint)
    assert all(tensor.abs().sum() > 0 for tensor in began.values())
    for name in [*list(LAYOUTS)[1:], "one device"]:
        folder = tmp_path / f"to {name}"
        run_ranks(load_each, LAYOUTS[name].ranks, recipe(tmp_path, name), [checkpoint], folder, 0)
        checkpoint = saved(folder / "0")
        assert same(whole_state(checkpoint), began), name


PAIRS = [
    pytest.param(
        "pipeline 2 x tensor 2, stage 1",
        ("stage 3, data 4", "tensor 2 x data 2, sequence, stage 3"),
        id="some to 3D",
    ),
    *(pytest.param(target, tuple(LAYOUTS), id=f"all to {target}", marks=pytest.mark.matrix)
      for target in LAYOUTS),
]  # fmt: skip


@pytest.mark.parametrize(("target", "sources"), PAIRS)
def test_the_losses_go_on_in_another_layout(
    target: str, sources: tuple[str, ...], saves: "Saves", tmp_path: Path
) -> None:
    """One engine loads all checkpoints, one after another: whatever it held before is written over."""
    found = [saves.of(source) for source in sources]
    checkpoints, values = [checkpoint for checkpoint, _ in found], recipe(saves.folder, target)
    losses = run_ranks(
        load_each, LAYOUTS[target].ranks, values, checkpoints, tmp_path, AFTER, timeout=2000
    )[0]
    for number, (source, (checkpoint, expected)) in enumerate(zip(sources, found, strict=True)):
        assert losses[number] == pytest.approx(expected, rel=BOUND), f"{source} to {target}"
        again = whole_state(saved(tmp_path / str(number)))
        assert same(again, whole_state(checkpoint)), f"{source} to {target}"


class Saves:
    """Layouts' checkpoints, and their losses after them; each is made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, tuple[Path, list[float]]] = {}
        write_text(folder / "text")

    def of(self, layout: str) -> tuple[Path, list[float]]:
        if layout not in self.made:
            self.made[layout] = _save(self.folder, layout)
        return self.made[layout]


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory, built_ops: object) -> Saves:
    return Saves(tmp_path_factory.mktemp("layouts"))


# A vocabulary and layers that do not divide by the ranks; adapters, whose model is not saved; and a
# router's bias, which is no parameter.
@pytest.mark.parametrize(
    ("model", "layouts"),
    [
        ("uneven", ("tensor 2, stage 1", "one device", "stage 3, data 2", "tensor 2, stage 1")),
        ("lora", ("stage 2, data 2, optimizer on the CPU", "one device", "stage 3, data 2")),
        pytest.param(
            "buffers",
            ("stage 2, data 4", "stage 3, data 2", "one device"),
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_a_transformers_model_goes_through_layouts(
    model: str, layouts: tuple[str, ...], tmp_path: Path
) -> None:
    write_text(tmp_path / "text")
    settings: dict[str, Any] = {"path": str(tmp_path / "config.json")}
    if model == "lora":
        settings = {"path": str(saved_llama(tmp_path)), "pretrained": True, "lora": LORA}
    else:
        values = SIZES | (MODELS | WHOLE_MODELS)[model] | {"max_position_embeddings": 32}
        (tmp_path / "config.json").write_text(json.dumps(values))
    first, *others = layouts
    checkpoint, expected = _save(tmp_path, first, **settings)
    began = whole_state(checkpoint)
    assert all("lora_" in name for name, _ in began) == (model == "lora")
    for name in others:
        folder, values = tmp_path / f"to {name}", recipe(tmp_path, name, **settings)
        (losses,) = run_ranks(load_each, LAYOUTS[name].ranks, values, [checkpoint], folder, AFTER)[
            0
        ]
        assert losses == pytest.approx(expected, rel=BOUND), name
        before, checkpoint = checkpoint, saved(folder / "0")
        assert same(whole_state(checkpoint), began), name
        if model == "buffers":
            kept = [(c / "buffers.safetensors").read_bytes() for c in (before, checkpoint)]
            assert kept[0] == kept[1]


@pytest.mark.matrix
def test_states_in_bf16_go_on_in_fp32_with_the_same_numbers(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    values = recipe(tmp_path, "stage 2, data 4")
    low = values | {"deepspeed": {
        "config": "ds_configs/zero2_bf16_states.json", "optimizer": values["deepspeed"]["optimizer"],
    }}  # fmt: skip
    run_ranks(save_then_train, 2, low, tmp_path / "low")
    checkpoint = saved(tmp_path / "low")
    began = whole_state(checkpoint)
    wide = recipe(tmp_path, "one device")
    run_ranks(load_each, 1, wide, [checkpoint], tmp_path / "wide", 0)
    assert same(whole_state(saved(tmp_path / "wide/0")), began)


def test_the_saved_weights_are_those_that_the_ranks_gather(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    name = "pipeline 2 x tensor 2, stage 1"
    run_ranks(_save_both_ways, LAYOUTS[name].ranks, recipe(tmp_path, name), tmp_path)
    gathered = torch.load(tmp_path / "gathered.pt", weights_only=True)
    state = whole_state(saved(tmp_path))
    assert {name for name, _ in state} == gathered.keys()
    assert all(torch.equal(state[name, "weight"], tensor) for name, tensor in gathered.items())
    assert {kind for _, kind in state} == {"weight", "exp_avg", "exp_avg_sq"}


def _save_both_ways(values: dict[str, Any], folder: Path) -> None:
    from launch.checkpoint.full_weights import full_weights
    from launch.training.setup import local_engine
    from launch.training.train_step import train_step
    from tests.resume.layouts import saver

    with local_engine(values, folder) as local:
        for step in range(BEFORE):
            train_step(local.engine, local.batch(step))
        saver(local, folder).save(BEFORE)
        whole = {name: tensor.clone() for name, tensor in full_weights(local.engine)}
        if local.ranks.is_main:
            torch.save(whole, folder / "gathered.pt")


def test_the_recipes_are_of_one_run(tmp_path: Path) -> None:
    assert len({recipe_from_dict(recipe(tmp_path, name)).train for name in LAYOUTS}) == 1
