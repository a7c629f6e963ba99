"""`family: hf` over tensor ranks, by DeepSpeed's AutoTP, equals one device without DeepSpeed."""

from pathlib import Path
from typing import Any

import pytest

from launch.checkpoint.full_weights import unsharded_shape
from launch.config.layout import plan_layout
from launch.config.load import load_recipe
from launch.config.resolve import resolve
from launch.deepspeed_patches.autotp import check_plan
from launch.errors import UserError
from launch.planner.dry_run import print_dry_run
from launch.training.build_model import meta_model
from tests.parity.cases import NO_CLIP, Case, Workbench
from tests.parity.hf_cases import MODELS, SIZES, HFCase
from tests.ranks import run_ranks
from tests.selection import representatives

CASES = [
    HFCase("zero0", 2, "fp32", model="llama"),
    HFCase("zero0", 4, "bf16", model="qwen3", checkpoint_activations=True),
    HFCase("zero1", 2, "fp32", model="biases", micro_batch=2),
    HFCase("zero1", 4, "fp32", model="qwen3", clip=NO_CLIP),
    HFCase("zero1", 2, "bf16", model="llama"),
    HFCase("zero2", 4, "fp32", model="llama", checkpoint_activations=True),
    HFCase("zero2", 2, "bf16", model="llama_tied", micro_batch=2),
    HFCase("zero2", 2, "fp32", model="one_key"),
    HFCase("zero3", 2, "fp32", model="qwen3"),
    HFCase("zero3", 4, "fp32", model="uneven"),
    HFCase("zero2_offload_cpu", 2, "fp32", model="qwen3"),
    HFCase("zero3_offload_cpu", 4, "bf16", model="llama_tied", checkpoint_activations=True),
]


def kinds(case: HFCase) -> set[object]:
    """Recipe, model, precision and clipping."""
    return {case.stem, case.model, case.precision, case.clip}


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize(
    "case", representatives(CASES, kinds, lambda case: case.ranks), ids=lambda case: case.name
)
def test_layout_equals_one_device(case: HFCase, bench: Workbench) -> None:
    differences = bench.compare(case, changes=case.few_rows)
    assert not [d for d in differences if d.past]
    assert {d.quantity for d in differences} >= {"loss", "grad norm", "weights"}


# Stage 0 with a bf16 copy of the weights, which the tiny recipe avoids: DeepSpeed clips elsewhere.
BF16_COPY = {
    "deepspeed.bf16.enabled": True,
    "deepspeed.torch_autocast.enabled": False,
    "deepspeed.data_types": "null",
}
BF16_AT_STAGE_0 = HFCase("zero0", 2, "bf16", model="llama")


def test_bf16_at_stage_0_equals_one_device(bench: Workbench) -> None:
    assert not [
        d
        for d in bench.compare(BF16_AT_STAGE_0, changes=BF16_COPY | BF16_AT_STAGE_0.few_rows)
        if d.past
    ]


def _replicas(values: dict[str, Any], scratch: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Some steps; then what this rank holds whole, and all parameters' shapes on one device."""
    from launch.checkpoint.full_weights import canonical_names, full_weights
    from launch.training.setup import local_engine
    from launch.training.train_step import train_step

    with local_engine(values, scratch) as local:
        for step in range(local.plan.recipe.train.steps):
            train_step(local.engine, local.batch(step))
        names = canonical_names(local.engine.module)
        shapes = {name: unsharded_shape(parameter) for name, parameter in names.items()}
        held = {
            name: tensor.tolist()
            for name, tensor in full_weights(local.engine)
            if not getattr(names[name], "tensor_model_parallel", False)
        }
    return held, shapes


@pytest.mark.parametrize("stem", [pytest.param("zero1", marks=pytest.mark.matrix), "zero3"])
def test_what_is_whole_stays_the_same_on_all_ranks(stem: str, bench: Workbench) -> None:
    case = HFCase(stem, 4, "bf16", model="qwen3")
    recipe = case.recipe(bench.folder, case.few_rows)
    results = run_ranks(_replicas, 4, recipe.model_dump(), bench.folder / "swap")
    held, shapes = results[0]
    assert all(others == held for others, _ in results)
    assert {"model.embed_tokens.weight", "model.layers.1.self_attn.q_norm.weight"} < held.keys()
    assert "model.layers.1.self_attn.q_proj.weight" not in held
    model: Any = meta_model(recipe)
    assert shapes == {name: tuple(p.shape) for name, p in model.model.named_parameters()}


REJECTED_MODELS: list[tuple[str, dict[str, Any], int, str]] = [
    ("gpt2", {}, 1, "transformers has no plan to shard gpt2 models"),
    ("olmo2", {}, 1, "rowwise_split_input, which DeepSpeed's AutoTP does not know"),
    ("apertus", {}, 1, "layers.0.mlp.act_fn.alpha_p of this apertus model works on a shard"),
    ("llama", {"num_key_value_heads": 1}, 3, "more than the model's 1 key/value heads"),
    ("llama", {"attention_dropout": 0.1}, 1, "use model.changes.attention_dropout=0.0"),
]


@pytest.mark.parametrize(("kind", "changes", "stage", "message"), REJECTED_MODELS)
def test_a_model_that_would_be_cut_wrongly_is_rejected(
    kind: str, changes: dict[str, Any], stage: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_plan(_on_meta(kind, changes), 2, stage)


def test_a_dry_run_refuses_it_too(tmp_path: Path) -> None:
    (tmp_path / "gpt2.json").write_text(
        '{"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 1}'
    )
    model = f"model.path={tmp_path / 'gpt2.json'}"
    changes = [model, "parallel.tensor=2", "data.sequence_length=64", "data.tokenizer=bytes"]
    recipe = load_recipe("recipes/hf_qwen3_0b6_zero2.yaml", changes)
    with pytest.raises(UserError, match="transformers has no plan to shard gpt2 models"):
        print_dry_run(recipe, 2)


def _on_meta(kind: str, changes: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig

    from models.hf import HFCausalLM, from_config

    known = AutoConfig.for_model(kind)
    sizes = {key: value for key, value in (SIZES | changes).items() if hasattr(known, key)}
    with torch.device("meta"):
        return HFCausalLM(from_config(AutoConfig.for_model(kind, **sizes)))


@pytest.mark.parametrize("name", MODELS)
def test_the_tested_models_are_accepted(name: str) -> None:
    values = dict(MODELS[name])
    check_plan(_on_meta(values.pop("model_type"), values), 2, stage=2)


def test_settings_of_the_json_that_go_wrong_are_rejected(bench: Workbench) -> None:
    def rejection(*overrides: str) -> str:
        recipe = Case("zero3", 2, overrides=("parallel.tensor=2", *overrides)).recipe(bench.folder)
        with pytest.raises(UserError) as caught:
            resolve(recipe, plan_layout(recipe, 2))
        return str(caught.value)

    zero = "deepspeed.zero_optimization."
    assert "take the block out of the JSON" in rejection("deepspeed.tensor_parallel.autotp_size=2")
    assert "zero_hpz_partition_size: it makes" in rejection(f"{zero}zero_hpz_partition_size=2")
    assert "zero_quantized_gradients: it makes" in rejection(f"{zero}zero_quantized_gradients=true")
