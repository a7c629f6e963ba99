"""Gather full weights under their canonical names, from any layout."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from models.gpt import GPT
from models.parallel.tensor_parallel import Shard
from models.pipeline import GPTPipeline

if TYPE_CHECKING:
    from models.hf import HFCausalLM


def canonical_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the name under which they are saved: tied ones once, without wrapper prefixes.

    For a pipeline stage: the parameters on this rank, by their names in the whole model.
    """
    if isinstance(model, GPTPipeline):
        return dict(model.canonical_parameters())
    inner: Any = model.model if is_hf(model) else model
    return dict(inner.named_parameters())


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a model's state has beside parameters, by canonical name: the same tensors on every rank.

    Only transformers models have some, for example the bias that balances DeepSeek-V3's experts.
    """
    if not is_hf(model):
        return {}
    parameters = {name for name, _ in model.model.named_parameters(remove_duplicate=False)}
    state = model.model.state_dict()
    return {name: tensor for name, tensor in state.items() if name not in parameters}


def is_hf(model: nn.Module) -> "TypeGuard[HFCausalLM]":
    """Whether a model is our wrapper around a transformers model.

    If so, `models.hf` is already loaded. Importing it here would cost all other runs the seconds
    that transformers takes to import.
    """
    hf = sys.modules.get("models.hf")
    return hf is not None and isinstance(model, hf.HFCausalLM)


def held_weights(engine: DeepSpeedEngine) -> dict[str, Callable[[], Tensor]]:
    """What this rank holds of each parameter, by canonical name: a function that returns it in fp32.

    That is the master weight where there is one: whole, or this tensor rank's shard. Under ZeRO each
    call is a collective of the data parallel ranks.
    """
    masters = {id(weight): master for weight, master in master_weights(engine)}

    def held(parameter: nn.Parameter) -> Tensor:
        master = masters.get(id(parameter))
        if master is None:
            master = safe_get_full_fp32_param(parameter)
        if master is None and hasattr(parameter, "ds_id"):  # frozen: ZeRO-3 keeps no master
            with GatheredParameters([parameter]):
                return parameter.detach().float().clone()
        return (parameter if master is None else master).detach().float()

    return {
        name: partial(held, parameter) for name, parameter in canonical_names(engine.module).items()
    }


def master_weights(engine: DeepSpeedEngine) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter with its fp32 master, where stage 0 keeps one."""
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        for weights, kept in zip(
            engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True
        ):
            yield from zip(weights, kept, strict=True)


def full_weights(engine: DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    """Yield each full parameter in fp32 (the master weight, if there is one), one at a time.

    Every rank must consume the whole iterator: each item is a collective if ZeRO, tensor or
    pipeline parallelism shards the model. The order is that of the model on one device.
    """
    parameters, held = canonical_names(engine.module), held_weights(engine)

    def local(name: str) -> Tensor:
        parameter, whole = parameters[name], held[name]()
        shard: Shard | None = getattr(parameter, "shard", None)
        if shard is None:
            return gather_tp_shards(engine, parameter, whole)
        group = _tensor_group(engine)
        shards = [torch.empty_like(whole) for _ in range(shard.size)]
        dist.all_gather(shards, whole.contiguous(), group=group)
        return shard.merge(shards)

    if isinstance(engine, PipelineEngine):
        yield from _over_stages(engine, list(parameters), local)
    else:
        for name in parameters:
            yield name, local(name)


def _tensor_group(engine: DeepSpeedEngine) -> dist.ProcessGroup:
    group: dist.ProcessGroup | None = engine.module.tp.group
    assert group is not None
    return group


def _over_stages(
    engine: PipelineEngine,
    held: list[str],
    local: Callable[[str], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Broadcast each parameter from the first stage that holds it to all stages."""
    grid = engine.grid
    group = grid.get_pipe_parallel_group()
    holders: list[list[str]] = [[] for _ in range(engine.num_stages)]
    dist.all_gather_object(holders, held, group=group)
    for name, shape in whole_shapes(engine.module).items():
        stage = next(s for s, names in enumerate(holders) if name in names)
        if engine.stage_id == stage:
            whole = local(name).contiguous()
        else:
            whole = torch.empty(shape, device=engine.device)
        dist.broadcast(whole, grid.stage_to_global(stage), group=group)
        yield name, whole


def whole_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters of the whole model, by canonical name, in model order."""
    if isinstance(model, GPT | GPTPipeline):
        with torch.device("meta"):
            whole = GPT(model.config)
        return {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
    return {name: unsharded_shape(parameter) for name, parameter in canonical_names(model).items()}


def unsharded_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter before AutoTP and ZeRO-3 shard it."""
    cut = getattr(parameter, DS_AUTOTP_UC_META, None)
    return tuple(cut["original_shape"] if cut else getattr(parameter, "ds_shape", parameter.shape))


def gather_tp_shards(engine: DeepSpeedEngine, parameter: nn.Parameter, shard: Tensor) -> Tensor:
    """Gather a full tensor from the tensor ranks' shards, which may be uneven. A collective.

    `shard` is this rank's shard in AutoTP's shape, or a replica, which is returned unchanged.
    """
    cut = getattr(parameter, DS_AUTOTP_UC_META, None)
    if cut is None or cut["replicated"]:
        return shard
    dim, sizes = cut["partition_dim"], cut["partition_sizes"]
    group = engine.mpu.get_tensor_model_parallel_group()
    shape = list(unsharded_shape(parameter))
    shape[dim] = max(sizes)
    padded = shard.new_zeros(shape)
    padded.narrow(dim, 0, sizes[dist.get_rank(group)]).copy_(shard)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([p.narrow(dim, 0, n) for p, n in zip(parts, sizes, strict=True)], dim)
