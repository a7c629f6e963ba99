"""Parameters and FLOPs of a recipe's model."""

from typing import TYPE_CHECKING, Any

from launch.config.schema import HFModel, Recipe
from models.config import count_parameters, flops_per_token

if TYPE_CHECKING:
    pass


def model_size(recipe: Recipe) -> tuple[int, float]:
    """Number of parameters, and FLOPs to train on one token (`models.config.flops_per_token`).

    A transformers model is built on the meta device; its attention term uses the number of layers
    and the query width from its config, if they have the usual names.
    """
    sequence = recipe.data.sequence_length
    if not isinstance(recipe.model, HFModel):
        config = recipe.model.shape
        return count_parameters(config), flops_per_token(config, sequence)
    import torch

    from launch.checkpoint.full_weights import canonical_names
    from launch.training.build_model import build_model

    model: Any = build_model(recipe, torch.float32, "meta")
    weights = canonical_names(model).values()
    parameters = sum(p.numel() for p in weights)
    hf = model.model.config
    embedding, output = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    tied = output is not None and output.weight is embedding.weight
    multiplied = parameters - (0 if tied else embedding.weight.numel())
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    attention = 12.0 * hf.num_hidden_layers * hf.num_attention_heads * head_dim * sequence
    # A frozen weight needs no gradient of its own, a third of the work.
    frozen = sum(p.numel() for p in weights if not p.requires_grad)
    return parameters, 6.0 * multiplied - 2.0 * min(frozen, multiplied) + attention
