"""Cases of `family: hf`: a tiny transformers model in the place of ours."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.certify.compositions import HF_SIZES as SIZES
from launch.config.load import recipe_from_dict
from launch.config.schema import Recipe
from tests.parity.cases import Case

__all__ = ["SIZES"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    # Norms of queries and keys, whole on every rank, see a shard of the heads.
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    # Biases of column-parallel layers are cut, of row-parallel ones whole.
    "biases": {"model_type": "llama", "tie_word_embeddings": False, "attention_bias": True},
    "uneven": {
        "model_type": "llama", "tie_word_embeddings": False, "vocab_size": 321,
        "hidden_size": 48, "intermediate_size": 49, "num_attention_heads": 6, "num_key_value_heads": 3,
    },
    # Of weights so large that rounding them is seen in the loss.
    "wide": {"model_type": "qwen3", "tie_word_embeddings": True, "initializer_range": 0.1},
    "one_key": {"model_type": "llama", "tie_word_embeddings": False, "num_key_value_heads": 1},
}  # fmt: skip
# AutoTP does not shard these, or not as transformers plans it.
WHOLE_MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    # Learns with a router loss, which has to count as transformers counts it.
    "mixture": {
        "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
        "output_router_logits": True, "router_aux_loss_coef": 0.1,
    },
    # Its routers have a bias that is a buffer, and that transformers keeps in fp32.
    "buffers": {
        "model_type": "glm4_moe", "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 0, "moe_intermediate_size": 16,
    },
}  # fmt: skip


@dataclass(frozen=True)
class HFCase(Case):
    """A tiny recipe's layout, with a transformers model in the place of ours."""

    model: str = "llama"
    tensor: int = 2

    @property
    def name(self) -> str:
        """For pytest's list."""
        return f"{self.stem}-{self.ranks}-{self.precision}-{self.model}"

    def recipe(self, folder: Path, changes: dict[str, Any] | None = None) -> Recipe:
        """The tiny recipe with this model, over `tensor` ranks."""
        file = folder / f"{self.model}.json"
        file.write_text(json.dumps(SIZES | (MODELS | WHOLE_MODELS)[self.model]))
        values = super().recipe(folder, changes).model_dump()
        values["model"] = {
            "family": "hf", "path": str(file), "checkpoint_activations": self.checkpoint_activations
        }  # fmt: skip
        values["parallel"]["tensor"] = self.tensor
        return recipe_from_dict(values)
