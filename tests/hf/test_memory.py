"""Peak memory of a process that reads or converts a model: about what it holds, not the whole model."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from launch.config.layout import plan_layout
from launch.config.load import recipe_from_dict
from launch.hf.export import consolidate, export
from launch.hf.import_model import import_model
from launch.hf.read_weights import weights_of
from launch.runtime.process_group import init_process_group
from launch.training.build_model import build_model, build_pipeline
from launch.training.engine import make_topology
from models.config import SIZES, with_changes
from models.gpt import GPT
from tests.hf.peers import LLAMA, saved_peer
from tests.hf.runs import finished_run, recipe
from tests.ranks import run_ranks

MIB = 2**20
SLACK = 16 * MIB  # buffers of files, and what the allocator keeps
# 49 million parameters, 187 MiB in fp32; the largest tensor of ours has 24 MiB.
LARGEST = 24 * MIB
BIG = {
    "hidden": 1024, "ffn": 3072, "layers": 4, "heads": 16, "kv_heads": 8, "vocab": 301,
}  # fmt: skip


def _memory(field: str) -> int:
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


@contextlib.contextmanager
def peak(found: list[int]) -> Iterator[None]:
    """Append by how many bytes the resident memory grew at its peak, mapped files included."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = _memory("VmRSS")
    yield
    found.append(_memory("VmHWM") - before)


def _build(values: dict[str, Any], small: dict[str, Any]) -> tuple[int, int]:
    """The growth at the peak, and the bytes of this rank's parameters."""
    recipes = [recipe_from_dict(each) for each in (small, values)]
    init_process_group()
    topology = make_topology(recipes[0], plan_layout(recipes[0], 2))
    device, tp = torch.device("cpu"), topology.tensor_parallel()
    found: list[int] = []
    for each in recipes:  # the first one to warm up
        with peak(found):
            model: Any = (
                build_pipeline(each, torch.float32, device, topology, tp)
                if topology.grid["pipeline"] > 1
                else build_model(each, torch.float32, device, tp)
            )
    return found[-1], sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with weights: big ones, and small ones to warm up with."""
    folder = tmp_path_factory.mktemp("weights")
    for name, values in (("big", BIG), ("small", {"layers": 2})):
        (folder / name).mkdir()
        config = with_changes(SIZES["tiny_llama"], values)
        state = {name: p.detach().fill_(0.5) for name, p in GPT(config).named_parameters()}
        save_file(state, folder / name / "model.safetensors")
    return folder


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_a_rank_holds_its_shard_and_a_tensor_more(axis: str, weights: Path) -> None:
    whole = (weights / "big" / "model.safetensors").stat().st_size
    assert whole > 180 * MIB
    values, small = (
        recipe({"size": "tiny_llama", "init_from": str(weights / name), **sizes})
        | {"parallel": {axis: 2}}
        for name, sizes in (("big", BIG), ("small", {"layers": 2}))
    )
    for grown, held in run_ranks(_build, 2, values, small):
        assert 0.4 * whole < held < 0.6 * whole
        assert held - SLACK < grown < held + LARGEST + SLACK, f"{grown / MIB:.0f} MiB"


def _convert(folder: Path) -> list[int]:
    found: list[int] = []
    for name in ("small", "big"):  # the first one to import modules
        theirs, imported, run = (folder / kind / name for kind in ("theirs", "imported", "runs"))
        with peak(found):
            import_model(str(theirs), imported)
        block = yaml.safe_load((imported / "model.yaml").read_text())["model"]
        finished_run(run, block, imported)
        with peak(found):
            export(weights_of(run), folder / "exported" / name)
        with peak(found):
            consolidate(weights_of(run), folder / f"{name}.safetensors", torch.float32)
    return found[-3:]


@pytest.mark.matrix
def test_conversion_holds_a_tensor_at_a_time(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4,
        "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 301,
    }  # fmt: skip
    saved_peer(LLAMA | sizes, tmp_path / "theirs" / "big")
    saved_peer(LLAMA | {"vocab_size": 301}, tmp_path / "theirs" / "small")
    importing, exporting, consolidating = run_ranks(_convert, 1, tmp_path)[0]
    # A fused tensor, and one of the parts that it is made of.
    assert importing < 2 * LARGEST + SLACK, f"{importing / MIB:.0f} MiB"
    assert exporting < LARGEST + SLACK, f"{exporting / MIB:.0f} MiB"
    assert consolidating < LARGEST + SLACK, f"{consolidating / MIB:.0f} MiB"
