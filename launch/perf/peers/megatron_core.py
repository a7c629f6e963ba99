"""Megatron-core with its own layers, schedules, gradient buffers and distributed optimizer. GPUs only.

Without Transformer Engine and Apex: what it would get from them is in `megatron_parts.py`. Attention is
torch's, LayerNorm is torch's with the mark that sequence parallelism needs, norms and scaling of lists of
gradients are torch's `_foreach`, and AdamW is torch's fused one.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, clip_grads, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor, nn

from launch.ds_json.view import optimizer_block
from launch.perf.peers.job import Job
from launch.perf.peers.megatron_parts import (
    Attention,
    Norm,
    norm_of_all,
    scale_all,
    set_initial_weights,
    transformer_config,
)


def train(job: Job) -> None:
    """Train the job's steps on this rank."""
    recipe, parallel = job.plan.recipe, job.plan.recipe.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(recipe.train.seed)
    config = transformer_config(job)
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    layer.submodules.self_attention.submodules.core_attention = Attention
    layers = [layer] * get_num_layers_to_build(config)
    last = parallel_state.is_pipeline_last_stage()
    model = GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm),
        vocab_size=job.config.vocab,
        max_sequence_length=job.config.context,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=last,
        share_embeddings_and_output_weights=job.config.tied,
        position_embedding_type="learned_absolute",
    )
    set_initial_weights(model, job)
    model.to(job.device, job.dtype).train()
    several = parallel_state.get_data_parallel_world_size() > 1
    buffers = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=several,
        overlap_param_gather=several,
        use_distributed_optimizer=True,
    )
    network = DistributedDataParallel(config, buffers, model)
    clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = norm_of_all, scale_all
    _, settings = optimizer_block(job.plan.ds_config)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=float(settings["lr"]), weight_decay=settings["weight_decay"],
            adam_beta1=settings["betas"][0], adam_beta2=settings["betas"][1], adam_eps=settings["eps"],
            clip_grad=job.clip, params_dtype=job.dtype, bf16=config.bf16,
            use_distributed_optimizer=True, overlap_param_gather=several,
        ),
        [network],
        use_gloo_process_groups=False,
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["fused"] = True  # in the place of Apex's
        # Megatron's own schedule would apply it: vectors do not decay.
        group["weight_decay"] = settings["weight_decay"] * group["wd_mult"]
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = network.no_sync
    places = torch.arange(recipe.data.sequence_length, device=job.device)
    run_passes = get_forward_backward_func()

    def mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.detach().clone()}

    def forward(batches: Iterator[tuple[Tensor, Tensor]], model: nn.Module) -> Any:
        tokens, labels = next(batches)
        return model(tokens, places.expand_as(tokens), None, labels=labels), mean

    def step(number: int) -> Tensor:
        job.set_learning_rate(optimizer, number)
        network.zero_grad_buffer()
        optimizer.zero_grad()
        found = run_passes(
            forward_step_func=forward,
            data_iterator=iter(job.micro_batches(number, parallel_state.get_data_parallel_rank())),
            model=[network],
            num_microbatches=job.accumulation,
            seq_length=recipe.data.sequence_length,
            micro_batch_size=job.plan.layout.micro_batch,
            forward_only=False,
        )
        optimizer.step()
        if not last:
            return torch.zeros((), device=job.device)
        # The last stage alone knows the loss, and a mean over all ranks follows.
        return torch.stack([each["loss"] for each in found]).mean() * parallel.pipeline

    job.train(step)
