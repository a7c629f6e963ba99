"""models/gpt.py computes what GPT-2, Llama and Qwen3 of transformers compute, and starts as promised."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from models.config import GPTConfig
from models.gpt import GPT
from models.init_weights import initialize
from models.parallel.cross_entropy import cross_entropy

VOCAB, CONTEXT, HIDDEN, LAYERS = 96, 32, 48, 3
TOLERANCE = 1e-5

GPT2 = GPTConfig(layers=LAYERS, hidden=HIDDEN, heads=4, vocab=VOCAB, context=CONTEXT)
LLAMA = GPTConfig(
    layers=LAYERS, hidden=HIDDEN, heads=4, kv_heads=2, ffn=80, vocab=VOCAB, context=CONTEXT,
    position="rope", rope_theta=500_000.0, norm="rmsnorm", mlp="swiglu", bias=False, tied=False,
)  # fmt: skip
# The heads are wider than hidden / heads, as in Qwen3 0.6B.
QWEN3 = replace(LLAMA, head_dim=24, qk_norm=True, tied=True, norm_eps=1e-6, rope_theta=1_000_000.0)
FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3}


def gpt2_peer() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_positions=CONTEXT, n_embd=HIDDEN, n_layer=LAYERS, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def llama_settings(config: GPTConfig) -> dict[str, object]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": config.ffn,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
    }


def llama_peer() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**llama_settings(LLAMA)))


def qwen3_peer() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**llama_settings(QWEN3)))


def from_gpt2(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's tensors (weights or gradients) by our names. Its Conv1D matrices are `[in, out]`."""
    ours = {
        "embedding.token.weight": theirs["transformer.wte.weight"],
        "embedding.position.weight": theirs["transformer.wpe.weight"],
        "norm.weight": theirs["transformer.ln_f.weight"],
        "norm.bias": theirs["transformer.ln_f.bias"],
    }
    for i in range(LAYERS):
        for our, their in (
            ("attention_norm", "ln_1"),
            ("attention.qkv", "attn.c_attn"),
            ("attention.out", "attn.c_proj"),
            ("mlp_norm", "ln_2"),
            ("mlp.up", "mlp.c_fc"),
            ("mlp.down", "mlp.c_proj"),
        ):
            weight = theirs[f"transformer.h.{i}.{their}.weight"]
            ours[f"blocks.{i}.{our}.weight"] = weight.t() if weight.dim() == 2 else weight
            ours[f"blocks.{i}.{our}.bias"] = theirs[f"transformer.h.{i}.{their}.bias"]
    return ours


def from_llama(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Llama's or Qwen3's tensors (weights or gradients) by our names."""
    ours = {
        "embedding.token.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
    }
    if "lm_head.weight" in theirs:
        ours["output.weight"] = theirs["lm_head.weight"]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for our, parts in (
            ("attention_norm", ["input_layernorm"]),
            ("attention.qkv", [f"self_attn.{part}_proj" for part in "qkv"]),
            ("attention.out", ["self_attn.o_proj"]),
            ("attention.query_norm", ["self_attn.q_norm"]),
            ("attention.key_norm", ["self_attn.k_norm"]),
            ("mlp_norm", ["post_attention_layernorm"]),
            ("mlp.up", ["mlp.gate_proj", "mlp.up_proj"]),
            ("mlp.down", ["mlp.down_proj"]),
        ):
            if f"{layer}.{parts[0]}.weight" in theirs:
                tensors = [theirs[f"{layer}.{part}.weight"] for part in parts]
                ours[f"blocks.{i}.{our}.weight"] = torch.cat(tensors)
    return ours


PEERS: dict[
    str,
    tuple[Callable[[], PreTrainedModel], Callable[[Mapping[str, Tensor]], dict[str, Tensor]]],
] = {
    "gpt2": (gpt2_peer, from_gpt2),
    "llama": (llama_peer, from_llama),
    "qwen3": (qwen3_peer, from_llama),
}


def random_tokens(batch: int = 2, length: int = CONTEXT, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def new_model(config: GPTConfig, *, seed: int = 1, checkpoint_activations: bool = False) -> GPT:
    model = GPT(config, checkpoint_activations)
    initialize(model, seed)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def far_from_first(model: nn.Module) -> None:
    """Biases of 0, norms of 1 and small matrices would hide a wrong name or a missing term."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_transformers(family: str) -> None:
    make_peer, translate = PEERS[family]
    torch.manual_seed(0)
    peer = make_peer().eval()
    far_from_first(peer)
    model = GPT(FAMILIES[family])
    model.load_state_dict(translate(dict(peer.named_parameters())), strict=not model.config.tied)
    tokens, labels = random_tokens(), random_tokens(seed=1)
    theirs, ours = peer(tokens).logits, model(tokens)
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    F.cross_entropy(theirs.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    model(tokens, labels).backward()
    expected, found = translate(gradients(peer)), gradients(model)
    assert expected.keys() == found.keys() == dict(model.named_parameters()).keys()
    for name, gradient in found.items():
        apart = (gradient - expected[name]).norm() / expected["embedding.token.weight"].norm()
        assert apart < TOLERANCE, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_sees_only_its_past(family: str) -> None:
    model = new_model(FAMILIES[family])
    far_from_first(model)
    tokens = random_tokens(batch=1)
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :20], before[:, :20])
    assert (after[:, 20:] - before[:, 20:]).abs().amax(-1).min() > 1e-4
    with torch.no_grad():  # and a shorter text gives the same as the start of a longer one
        torch.testing.assert_close(model(tokens[:, :20]), before[:, :20], rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_sum_over_tokens_in_fp32() -> None:
    model = new_model(GPT2)
    tokens, labels = random_tokens(), random_tokens(seed=1)
    logits = model(tokens).double()
    picked = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1))
    assert model(tokens, labels).item() == pytest.approx(-picked.sum().item(), rel=1e-6)
    assert cross_entropy(torch.zeros(1, 2, 96, dtype=torch.bfloat16), labels[:1, :2]).dtype == (
        torch.float32
    )
    # A new model knows nothing: all words are about equally likely.
    mean = model(tokens, labels).item() / labels.numel()
    assert mean == pytest.approx(math.log(VOCAB), abs=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_weights_depend_on_name_and_seed_alone(family: str) -> None:
    config = FAMILIES[family]
    torch.manual_seed(0)
    first = dict(new_model(config).named_parameters())
    torch.manual_seed(99)
    torch.rand(7)
    again = dict(new_model(config).named_parameters())
    other_seed = dict(new_model(config, seed=2).named_parameters())
    deeper = dict(new_model(replace(config, layers=LAYERS + 1)).named_parameters())
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), name
        if parameter.dim() == 2:
            assert not torch.equal(parameter, other_seed[name]), name
        if not name.endswith(("attention.out.weight", "mlp.down.weight")):
            assert torch.equal(parameter, deeper[name]), name
    drawn = [p.flatten()[:8] for p in first.values() if p.dim() == 2]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == len(drawn), (
        "tensors share numbers"
    )


def test_first_weights_have_the_promised_spread() -> None:
    config = GPTConfig(layers=8, hidden=256, heads=4, vocab=512, context=256, init_std=0.05)
    for name, parameter in new_model(config).named_parameters():
        if parameter.dim() == 1:
            expected = 0.0 if name.endswith("bias") else 1.0
            assert torch.equal(parameter, torch.full_like(parameter, expected)), name
            continue
        residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        std = 0.05 / math.sqrt(2 * 8) if residual else 0.05
        assert parameter.std().item() == pytest.approx(std, rel=0.02), name
        assert abs(parameter.mean().item()) < std / 50, name


def test_first_weights_in_bf16_are_those_of_fp32_rounded() -> None:
    whole, half = GPT(GPT2), GPT(GPT2).bfloat16()
    initialize(whole, 5)
    initialize(half, 5)
    for (name, a), b in zip(whole.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_activations_give_the_same_gradients(family: str, dropout: float) -> None:
    config = replace(FAMILIES[family], dropout=dropout)
    tokens, labels = random_tokens(), random_tokens(seed=1)
    found = []
    for checkpointed in (False, True):
        model = new_model(config, checkpoint_activations=checkpointed).train()
        torch.manual_seed(7)  # the masks; the second forward pass of a block must draw them again
        loss = model(tokens, labels)
        loss.backward()
        found.append((loss, gradients(model)))
    (loss, plain), (loss_again, recomputed) = found
    assert torch.equal(loss, loss_again)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-8)


def test_checkpointing_keeps_fewer_activations() -> None:
    def kept(checkpointed: bool) -> int:
        model = new_model(GPT2, checkpoint_activations=checkpointed).train()
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(random_tokens(), random_tokens(seed=1))
        return sum(sizes)

    assert kept(True) < kept(False) / 3


def test_dropout_changes_training_and_not_evaluation() -> None:
    tokens = random_tokens()
    model, plain = new_model(replace(GPT2, dropout=0.5)), new_model(GPT2)
    assert torch.equal(model.eval()(tokens), plain.eval()(tokens))
    assert not torch.equal(model.train()(tokens), plain.train()(tokens))
