"""Small models of transformers with random weights: what ours are compared with.

They are made by transformers' own classes, and share nothing with `launch/hf`. Biases and norms are
random too: with zeros and ones, two that were swapped would compute the same.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2,
    "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "vocab_size": 97, "n_positions": 32, "n_embd": 48, "n_layer": 2,
    "n_head": 4,
}  # fmt: skip
NEOX: dict[str, Any] = {
    "model_type": "gpt_neox", "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2,
    "intermediate_size": 80, "num_attention_heads": 4, "max_position_embeddings": 32,
    "hidden_act": "gelu_new", "use_parallel_residual": False,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 1.0,
    },
}  # fmt: skip
PEERS: dict[str, dict[str, Any]] = {
    "gpt_neox": NEOX,
    "gpt_neox, tied": NEOX | {"tie_word_embeddings": True},
    "gpt2": GPT2,
    "gpt2, untied, narrow MLP": GPT2 | {"tie_word_embeddings": False, "n_inner": 80},
    "llama": LLAMA,
    "llama, tied, biases, wide heads": LLAMA | {
        "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 24,
        "rms_norm_eps": 1e-5,
    },
    "qwen3, tied": LLAMA | {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 24},
    "qwen3, one key head": LLAMA | {
        "model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 16,
    },
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": None},
    "mistral, window as long as the context": LLAMA | {
        "model_type": "mistral", "sliding_window": 32,
    },
}  # fmt: skip


def peer(values: dict[str, Any], seed: int = 0) -> Any:
    """A model of transformers in fp32 in which every number is random, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.08
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(center + scale * torch.randn(parameter.shape))
    return model.eval()


def saved_peer(values: dict[str, Any], folder: Path, **save: Any) -> Any:
    """A peer, saved into a folder as transformers saves it."""
    model = peer(values)
    model.save_pretrained(folder, **save)
    return model


@torch.no_grad()
def logits(model: Any, rows: int = 3, length: int = 24) -> Tensor:
    """`[rows, length, 97]` logits for fixed tokens, of a model of ours or of transformers."""
    tokens = torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(5))
    out = model(tokens)
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found.float()
