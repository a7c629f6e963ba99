"""Family hf against transformers: dtypes, long positions, final weights, and what is rejected."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from launch.checkpoint.full_weights import canonical_names, persistent_buffers
from launch.checkpoint.safetensors_io import load_weights
from launch.config.load import load_recipe
from launch.config.schema import Recipe
from launch.errors import UserError
from launch.planner.dry_run import print_dry_run
from launch.training.build_model import build_model
from launch.training.setup import plan_run
from models.hf import HFCausalLM, from_config
from tests.parity.hf_cases import MODELS, SIZES, WHOLE_MODELS

KINDS: dict[str, dict[str, Any]] = {
    **{name: SIZES | values for name, values in (MODELS | WHOLE_MODELS).items()},
    "deepseek_v3": {
        "model_type": "deepseek_v3", "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2,
        "intermediate_size": 48, "moe_intermediate_size": 16, "num_attention_heads": 4,
        "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "max_position_embeddings": 16,
    },
    "gpt_oss": SIZES | {
        "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip


def recipe_of(folder: Path, values: dict[str, Any], *overrides: str) -> Recipe:
    """A recipe whose model has this configuration, on sequences of 16."""
    config = folder / "model" / "config.json"
    config.parent.mkdir(exist_ok=True)
    config.write_text(json.dumps(values))
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({
        "model": {"family": "hf", "path": str(config)},
        "data": {"source": "python-stdlib", "tokenizer": "bytes", "sequence_length": 16},
        "train": {"steps": 2, "global_batch_size": 4, "micro_batch_size": 2},
        "deepspeed": {"config": "ds_configs/zero2.json"},
    }))  # fmt: skip
    return load_recipe(file, overrides)


def as_transformers_loads(folder: Path, values: dict[str, Any], dtype: torch.dtype) -> Any:
    """Weights of their own kind, in a folder; and the model that `from_pretrained` makes of it."""
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("name", KINDS)
def test_parameters_and_buffers_have_transformers_dtypes(name: str, tmp_path: Path) -> None:
    theirs = as_transformers_loads(tmp_path, KINDS[name], torch.bfloat16)
    recipe = recipe_of(tmp_path, KINDS[name], f"model.path={tmp_path}", "model.pretrained=true")
    ours: Any = build_model(recipe, torch.bfloat16, "cpu")
    for kind in ("named_parameters", "named_buffers"):
        expected = {n: (t.dtype, t) for n, t in getattr(theirs, kind)()}
        found = {n: (t.dtype, t) for n, t in getattr(ours.model, kind)()}
        assert {n: t[0] for n, t in found.items()} == {n: t[0] for n, t in expected.items()}
        assert all(torch.equal(found[n][1], t[1]) for n, t in expected.items())


def test_a_position_far_away_is_where_transformers_has_it(tmp_path: Path) -> None:
    """Rotary frequencies in bf16 would be off by 0.4%: 8 radians at position 2,000."""
    values = KINDS["llama"] | {"max_position_embeddings": 2048, "initializer_range": 0.5}
    theirs = as_transformers_loads(tmp_path, values, torch.bfloat16)
    recipe = recipe_of(tmp_path, values, f"model.path={tmp_path}", "model.pretrained=true")
    ours: Any = build_model(recipe, torch.bfloat16, "cpu").eval()
    tokens = torch.arange(2000)[None] % 320
    with torch.no_grad():
        expected = theirs(input_ids=tokens, use_cache=False).logits
        assert torch.equal(ours(tokens), expected)
        cast = ours.to(torch.bfloat16)(tokens)[0, 1984]
    assert float((cast - expected[0, 1984]).norm() / expected[0, 1984].norm()) > 0.05


@pytest.mark.parametrize(
    ("name", "changes", "precision"),
    [("gpt_oss", {}, "fp16"), ("ernie", {"model_type": "ernie4_5_moe"}, "bf16")],
)
def test_a_parameter_that_transformers_keeps_in_fp32_is_refused(
    name: str, changes: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    values = (KINDS.get(name, SIZES) | changes) if name == "gpt_oss" else changes | SIZES
    recipe = recipe_of(
        tmp_path, values, "deepspeed.bf16.enabled=false", f"deepspeed.{precision}.enabled=true"
    )
    with pytest.raises(UserError, match=r"transformers keeps .* in fp32, and DeepSpeed would not"):
        print_dry_run(recipe, 1)


def test_the_router_loss_counts_in_training_alone() -> None:
    values = KINDS["mixture"]
    config = AutoConfig.for_model(**values)
    torch.manual_seed(1)
    model = HFCausalLM(from_config(config))
    tokens = torch.arange(32).view(2, 16)
    labels = tokens + 1
    with torch.no_grad():
        theirs = model.model(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False)
        torch.testing.assert_close(model(tokens, labels), theirs.loss * 32)
        plain = model.eval()(tokens, labels)
    assert float(theirs.loss * 32 - plain) > 1.0


def test_a_router_loss_without_a_known_coefficient_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {
        "model_type": "jetmoe", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 320,
        "num_key_value_heads": 2, "kv_channels": 8, "intermediate_size": 48,
        "output_router_logits": True, "max_position_embeddings": 16,
    })  # fmt: skip
    with pytest.raises(UserError, match="router loss is not known"):
        print_dry_run(recipe, 1)


ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {}, "roberta": {}, "electra": {"embedding_size": 32}, "xlnet": {"d_model": 32, "n_layer": 2,
    "n_head": 4, "d_inner": 48}, "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_refused(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 320} | ({} if kind == "xlnet" else {"max_position_embeddings": 40})
    if kind in ("bert", "roberta", "electra"):
        sizes |= {k: v for k, v in SIZES.items() if k in ("hidden_size", "intermediate_size",
                  "num_hidden_layers", "num_attention_heads")}  # fmt: skip
    recipe = recipe_of(tmp_path, {"model_type": kind} | sizes | ENCODERS[kind])
    with pytest.raises(UserError, match="is not causal: it sees the tokens that it is to predict"):
        build_model(recipe, torch.float32, "cpu")


def test_an_encoder_made_a_decoder_is_accepted(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path,
        {"model_type": "bert", "vocab_size": 320, "is_decoder": True, "max_position_embeddings": 40}
        | {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers",
                                 "num_attention_heads")},
    )  # fmt: skip
    build_model(recipe, torch.float32, "cpu")


TOO_SMALL = [
    (["data.sequence_length=32"], "data.sequence_length: 32 is more than the 16 positions"),
    (["model.changes.vocab_size=200"], "bytes has 257 tokens, and the model's vocabulary is 200"),
]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("overrides", "message"), TOO_SMALL)
def test_a_model_too_small_for_the_data_is_refused_before_tokenising(
    overrides: list[str], message: str, kind: str, tmp_path: Path
) -> None:
    values = KINDS[kind] | ({"n_positions": 16} if kind == "gpt2" else {})
    cache = tmp_path / "cache"
    recipe = recipe_of(tmp_path, values, f"data.cache_dir={cache}", *overrides)
    for check in (lambda: print_dry_run(recipe, 1), lambda: plan_run(recipe, 1)):
        with pytest.raises(UserError, match=message):
            check()
    assert not cache.exists()


def test_a_model_that_cannot_be_built_is_refused_before_tokenising(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    recipe = recipe_of(
        tmp_path, KINDS["llama"] | {"num_attention_heads": 5}, f"data.cache_dir={cache}"
    )
    for check in (lambda: print_dry_run(recipe, 1), lambda: plan_run(recipe, 1)):
        with pytest.raises(UserError, match="is not usable"):
            check()
    assert not cache.exists()


@pytest.mark.parametrize("name", ["buffers", "mixture", "gpt_oss", "deepseek_v3"])
def test_the_final_weights_are_what_transformers_loads(name: str, tmp_path: Path) -> None:
    """Buffers included: without them, `from_pretrained` would start DeepSeek-V3's at zero."""
    torch.manual_seed(2)
    config = AutoConfig.for_model(**KINDS[name])
    model = HFCausalLM(from_config(config))
    buffers = persistent_buffers(model)
    for buffer in buffers.values():
        buffer.copy_(torch.arange(5.0, 5.0 + buffer.numel()).view(buffer.shape))
    assert any(buffers) == (name in ("buffers", "deepseek_v3"))
    state = {key: tensor.detach() for key, tensor in canonical_names(model).items()}
    save_file(state | buffers, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(tmp_path)

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    again = HFCausalLM(from_config(config))
    load_weights(again, tmp_path)
    for loaded in (theirs, again.model):
        found = loaded.state_dict()
        assert all(
            torch.equal(found[key], tensor) for key, tensor in model.model.state_dict().items()
        )


CHANGES: list[tuple[str, str]] = [
    ("num_hidden_layers=abc", "Field 'num_hidden_layers' expected int, got str"),
    ("num_hidden_layer=1", "LlamaConfig has no key 'num_hidden_layer'"),
    ("use_return_dict=true", "LlamaConfig has no key 'use_return_dict'"),
    ("dtype=bfloat16", "changes.dtype would do nothing: the DeepSpeed JSON decides"),
    ("rope_theta=1e6", "no key 'rope_theta'; set rope_parameters as a whole, which is"),
    ("rope_scaling={factor: 2.0}", "no key 'rope_scaling'; set rope_parameters as a whole"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_change_that_is_wrong_or_does_nothing_is_refused(
    change: str, message: str, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, KINDS["llama"], f"model.changes.{change}")
    with pytest.raises(UserError, match=message) as caught:
        build_model(recipe, torch.float32, "meta")
    assert "\n" not in str(caught.value)


def test_a_change_of_the_rotary_frequencies_has_an_effect(tmp_path: Path) -> None:
    change = "model.changes.rope_parameters={rope_type: default, rope_theta: 100.0}"
    frequencies = []
    for overrides in ([], [change]):
        model: Any = build_model(
            recipe_of(tmp_path, KINDS["llama"], *overrides), torch.float32, "cpu"
        )
        frequencies.append(model.model.get_buffer("model.rotary_emb.inv_freq"))
    assert float(frequencies[1][1] / frequencies[0][1]) == pytest.approx(100.0**0.25, rel=1e-3)
