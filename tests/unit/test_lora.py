"""Adapters: what is saved opens in peft and transformers, from any layout; and what is rejected."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch.checkpoint.full_weights import canonical_names
from launch.config.load import recipe_from_dict
from launch.config.schema import Recipe
from launch.errors import UserError
from launch.training.build_model import build_model
from launch.training.optimizer import parameter_groups
from tests.parity.sft_cases import LORA, SFTCase, saved_llama
from tests.ranks import run_ranks
from tests.selection import representatives

TOKENS = torch.arange(40, 60)[None]


def train_and_finish(values: dict[str, Any], folder: Path, steps: int) -> None:
    """Run in each rank: some steps, then what the end of a run writes, a sample included."""
    from launch.runtime.run_dir import RunDir
    from launch.training.finalize import finish
    from launch.training.setup import local_engine
    from launch.training.train_step import train_step

    with local_engine(values, folder / "swap") as local:
        for step in range(steps):
            train_step(local.engine, local.batch(step))
        plan = local.plan
        finish(
            plan.recipe, plan.ds_config, local.engine, RunDir(folder), plan.corpus, local.ranks, 1.0
        )


CASES = [
    SFTCase("zero3", 2, model="lora"),
    SFTCase("zero2", 2, model="lora"),
    SFTCase("zero0", 2, "bf16", model="lora"),
    SFTCase("zero3", 2, "bf16", model="lora"),
    SFTCase("zero3_offload_cpu", 2, model="lora"),
]


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize(
    "case", representatives(CASES, lambda case: {case.stem[:5]}), ids=lambda case: case.name
)
def test_the_adapter_and_the_merged_weights_are_the_same_model(
    case: SFTCase, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe = case.recipe(tmp_path, {"run.sample_tokens": 2, "deepspeed.optimizer.params.lr": 0.05})
    run = tmp_path / "run"
    run.mkdir()
    run_ranks(train_and_finish, case.ranks, recipe.model_dump(), run, 2)

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    adapted = PeftModel.from_pretrained(load(saved_llama(tmp_path)), str(run / "adapter"))
    with torch.no_grad():
        base, merged = (load(path)(TOKENS).logits for path in (saved_llama(tmp_path), run))
        beside = adapted.eval()(TOKENS).logits
    limit = 1e-5 if case.precision == "fp32" else 1e-2  # the merged weights are rounded to bf16
    apart = float((merged - beside).norm() / beside.norm())
    assert apart < limit < float((merged - base).norm() / base.norm())
    assert (
        load_file(run / "model.safetensors").keys()
        == load_file(saved_llama(tmp_path) / "model.safetensors").keys()
    )
    assert {t.dtype for t in load_file(run / "adapter" / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    model = build_model(recipe.with_adapters_merged(), torch.float32, "cpu")
    assert canonical_names(model).keys() == load_file(run / "model.safetensors").keys()


def lora_recipe(folder: Path, **lora: Any) -> Recipe:
    values = SFTCase("zero2", 1, model="lora").recipe(folder).model_dump()
    values["model"]["lora"] = lora
    return recipe_from_dict(values)


def test_initial_adapters_depend_on_the_seed_alone(tmp_path: Path) -> None:
    recipe = lora_recipe(tmp_path, **LORA)
    torch.manual_seed(99)  # whatever was drawn before
    first = canonical_names(build_model(recipe, torch.float32, "cpu"))
    second = canonical_names(build_model(recipe, torch.float32, "cpu"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    values = recipe.model_dump()
    values["train"]["seed"] += 1
    other = canonical_names(build_model(recipe_from_dict(values), torch.float32, "cpu"))
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {name for name in first if ".lora_A." in name}


def test_only_adapters_are_trained(tmp_path: Path) -> None:
    model = build_model(lora_recipe(tmp_path, rank=4), torch.bfloat16, "cpu")
    names = canonical_names(model)
    trained = {id(p) for group in parameter_groups(model) for p in group["params"]}
    assert {name for name, p in names.items() if id(p) in trained} == {
        name for name in names if ".lora_" in name
    }
    assert sum(".lora_A." in name for name in names) == 2 * 7, "all linear layers but the head"
    assert {p.dtype for p in names.values()} == {torch.bfloat16}


def recipe_with(folder: Path, model: dict[str, Any], **blocks: dict[str, Any]) -> Recipe:
    values = SFTCase("zero2", 1, model="lora").recipe(folder).model_dump()
    values["model"] |= model
    for name, changes in blocks.items():
        values[name] |= changes
    return recipe_from_dict(values)


REJECTED: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]], str]] = {
    "tensor": ({}, {"parallel": {"tensor": 2}}, r"model\.lora: nothing checks adapters of layers that"),
    "pipeline": ({}, {"parallel": {"pipeline": 2}}, r"parallel\.pipeline: stages are made of our own"),
    "compile": ({}, {"train": {"compile": True}}, r"train\.compile: nothing checks adapters"),
    "rank": ({"lora": {"rank": 0}}, {}, r"model\.lora\.rank: .*greater than 0"),
    "key": ({"lora": {"ranks": 8}}, {}, r"unknown key model\.lora\.ranks; did you mean 'rank'"),
    "no layer": ({"lora": {"targets": ["qq_proj"]}}, {}, r"model\.lora\.targets: .*qq_proj.* not found"),
    "embedding": (
        {"lora": {"targets": ["embed_tokens"]}}, {},
        r"model\.lora\.targets: model\.embed_tokens is a Embedding, and only linear",
    ),
    "tied": (
        {"lora": {"targets": ["lm_head"]}, "changes": {"tie_word_embeddings": True}}, {},
        r"model\.lora\.targets: .* are one weight, which cannot get an adapter in one place",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REJECTED)
def test_what_adapters_do_not_compose_with_is_rejected(kind: str, tmp_path: Path) -> None:
    model, blocks, message = REJECTED[kind]
    with pytest.raises(UserError, match=message) as error:
        build_model(recipe_with(tmp_path, model, **blocks), torch.float32, "meta")
    assert "\n" not in str(error.value)


def test_a_model_that_sees_across_documents_is_rejected(tmp_path: Path) -> None:
    """A Mamba has no attention that positions could mask."""
    config = {"model_type": "mamba", "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 1}
    file = tmp_path / "mamba.json"
    file.write_text(json.dumps(config))
    changes = {"path": str(file), "pretrained": False, "lora": None}
    with pytest.raises(UserError, match=r"MambaForCausalLM .*data\.format=chat") as error:
        build_model(recipe_with(tmp_path, changes), torch.float32, "cpu")
    assert "\n" not in str(error.value)
