"""What the Megatron-core peer needs beside Megatron: layers in place of Apex's, sizes, weights."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from launch.perf.peers.job import Job
from launch.perf.peers.plain_gpt import by_head
from models.init_weights import initialize_parameters

NAMES = {
    "input_layernorm": "attention_norm", "self_attention.linear_qkv": "attention.qkv",
    "self_attention.linear_proj": "attention.out", "pre_mlp_layernorm": "mlp_norm",
    "mlp.linear_fc1": "mlp.up", "mlp.linear_fc2": "mlp.down",
    "embedding.word_embeddings": "embedding.token", "embedding.position_embeddings": "embedding.position",
    "decoder.final_layernorm": "norm",
}  # fmt: skip


class Norm(nn.LayerNorm):
    """torch's LayerNorm; the marks have Megatron sum its gradients over ranks with other tokens."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        marked: Any
        for marked in self.parameters():
            marked.sequence_parallel = config.sequence_parallel


class Attention(nn.Module):
    """torch's attention on Megatron's `[sequence, batch, heads, head_dim]`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """To `[sequence, batch, heads * head_dim]`."""
        query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.permute(2, 0, 1, 3).flatten(2)


def norm_of_all(chunk: Any, flag: Any, lists: list[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """The global norm of a list of gradients."""
    return torch.stack(torch._foreach_norm(lists[0])).norm().view(1), None


def scale_all(chunk: Any, flag: Any, lists: list[list[Tensor]], factor: float) -> None:
    """Scale a list of gradients where they are."""
    torch._foreach_mul_(lists[0], factor)


def transformer_config(job: Job) -> TransformerConfig:
    """The recipe's sizes and degrees; of two stages the last, with the head, has fewer layers."""
    sizes, parallel = job.config, job.plan.recipe.parallel
    uneven: dict[str, int] = {}
    if parallel.pipeline == 2 and sizes.layers % 2 == 0 and sizes.layers > 2:
        half = sizes.layers // 2
        uneven = {
            "num_layers_in_first_pipeline_stage": half + 1,
            "num_layers_in_last_pipeline_stage": half - 1,
        }
    return TransformerConfig(
        num_layers=sizes.layers, hidden_size=sizes.hidden, num_attention_heads=sizes.heads,
        ffn_hidden_size=sizes.ffn, hidden_dropout=0.0, attention_dropout=0.0,
        layernorm_epsilon=sizes.norm_eps, tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline, sequence_parallel=parallel.sequence,
        params_dtype=job.dtype, pipeline_dtype=job.dtype, bf16=job.dtype is torch.bfloat16,
        bias_activation_fusion=True, bias_dropout_fusion=True, masked_softmax_fusion=False,
        persist_layer_norm=False, gradient_accumulation_fusion=False, cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="native", deallocate_pipeline_outputs=parallel.pipeline > 1,
        transformer_impl="local", **uneven,
    )  # fmt: skip


def set_initial_weights(model: GPTModel, job: Job) -> None:
    """The recipe's initial weights: this rank's part of each, in Megatron's order of rows."""
    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    head = "embedding.token" if job.config.tied else "output"
    for path, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            place, prefix = path, ""
            if path.startswith("decoder.layers."):
                _, _, number, place = path.split(".", 3)
                layer = model.decoder.layers[int(number)].layer_number - 1  # over all stages
                prefix = f"blocks.{layer}."
            ours = f"{prefix}{NAMES.get(place, head)}.{kind}"
            shape, dim = list(parameter.shape), getattr(parameter, "partition_dim", -1)
            sharded = getattr(parameter, "tensor_model_parallel", False) and size > 1
            if sharded:
                shape[dim] *= size
            whole = nn.Parameter(torch.empty(shape, device=job.device))
            initialize_parameters([(ours, whole)], job.config, job.plan.recipe.train.seed)
            drawn = by_head(whole, job.config) if ".qkv." in ours else whole
            parameter.data.copy_(drawn.chunk(size, dim)[rank] if sharded else drawn)
