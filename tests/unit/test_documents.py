"""Several documents in a row: each gets the logits that it would have alone, in every family."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from launch.data.batches import document_positions
from models.config import GPTConfig
from models.gpt import GPT
from models.hf import HFCausalLM, from_config
from models.init_weights import initialize

SEPARATOR, VOCAB, CONTEXT = 60, 61, 24
LEARNED = GPTConfig(layers=2, hidden=32, heads=4, vocab=VOCAB, context=CONTEXT)
ROTARY = GPTConfig(
    layers=2, hidden=32, heads=4, kv_heads=2, vocab=VOCAB, context=CONTEXT, position="rope",
    norm="rmsnorm", mlp="swiglu",
)  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    "llama": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
    },
}  # fmt: skip


def ours(config: GPTConfig) -> nn.Module:
    model = GPT(config)
    initialize(model, seed=1)
    return model


def theirs(kind: str) -> nn.Module:
    torch.manual_seed(1)
    return HFCausalLM(from_config(AutoConfig.for_model(kind, vocab_size=VOCAB, **SIZES[kind])))


MODELS = {
    "learned": lambda: ours(LEARNED), "rope": lambda: ours(ROTARY),
    "hf gpt2": lambda: theirs("gpt2"), "hf llama": lambda: theirs("llama"),
}  # fmt: skip


def documents() -> list[Tensor]:
    """Four of them: the first is the end of a text, the others begin with a separator."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i, length in enumerate((5, 9, 1, 6)):
        ids = torch.randint(0, SEPARATOR, (length,), generator=generator)
        found.append(torch.cat((torch.tensor([SEPARATOR]), ids)) if i else ids)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_document_is_read_as_if_alone(name: str) -> None:
    model, parts = MODELS[name]().eval(), documents()
    row = torch.cat(parts)[None]
    positions = document_positions(row, SEPARATOR)
    with torch.no_grad():
        alone = torch.cat([model(part[None]) for part in parts], dim=1)
        packed = model(row, positions=positions)
        across = model(row)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
    # Without positions all but the first document look different.
    apart = (across - alone).abs().amax(-1)[0]
    assert apart[: len(parts[0])].max() < 1e-5 < apart[len(parts[0]) :].max()


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_labels_scale_their_losses(name: str) -> None:
    model, row = MODELS[name]().eval(), torch.cat(documents())[None]
    weights = torch.linspace(0.0, 2.0, row.shape[1] - 1)[None]
    tokens, labels = row[:, :-1], row[:, 1:]
    with torch.no_grad():
        odds = model(tokens).double().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        expected = -(odds * weights).sum()
        found = model(tokens, labels, weights)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
        once = model(tokens, labels, torch.ones_like(weights))
        torch.testing.assert_close(once, model(tokens, labels), rtol=1e-6, atol=0)
