"""Train a probe with DeepSpeed alone, as its documentation says, on one rank of a run.

Only what every version of the survey has is used, and nothing is worked around. Two things are switched
off, because they compile C++ for half a minute: gloo's replacement for ranks on one host (`shm_comm`),
and torch.compile, which newer versions put around Muon. And DeepSpeed, which takes fp16 only on CPUs
that are fast at it, is told that this one is.
"""

import importlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from launch.versions.model import (
    MICRO_BATCH,
    Block,
    Embedding,
    Head,
    Model,
    batch,
    cross_entropy,
    project,
)
from launch.versions.probes import BLOCKS, STEPS, Probe
from launch.versions.reference import (
    ADAM_RATE,
    BETAS,
    EPSILON,
    FP16_SCALE,
    MOMENTUM,
    optimizers,
)
from launch.versions.results import Record, Weights

SPIKE = 2.0**12  # a loss times this overflows fp16 under any scale of the probes


def train(probe: Probe, rank: int, rendezvous: str) -> Record:
    """Train on this rank; `rendezvous` is a file that the ranks of this run alone know.

    Returns:
        The losses averaged over this rank's micro batches, and the weights that this rank holds.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(probe.ranks))
    os.environ.update(LOCAL_SIZE=str(probe.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    deepspeed.utils.logger.setLevel("ERROR")
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
    torch.compiler.set_stance("force_eager")
    type(get_accelerator()).is_fp16_supported = lambda self: True
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, verbose=False, init_method=f"file://{rendezvous}",
        rank=rank, world_size=probe.ranks,
    )  # fmt: skip
    return _train_pipeline(probe) if probe.loop == "pipeline" else _train_engine(probe, rank)


def deepspeed_json(probe: Probe) -> dict[str, Any]:
    """The DeepSpeed JSON of a probe."""
    json: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": 1 if probe.loop == "boundary" else probe.accumulation,
        "gradient_clipping": probe.clip,  # left out, it means 0 in some versions and 1 in others
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # else offload takes no optimizer of torch
        "zero_optimization": {"stage": probe.stage, **probe.zero},
    }
    if probe.dtype == "bf16":
        json["bf16"] = {"enabled": True}
    elif probe.dtype == "fp16":
        moving = {"loss_scale": 0, "initial_scale_power": 11, "hysteresis": 1}
        json["fp16"] = {"enabled": True} | (
            moving if probe.overflow else {"loss_scale": FP16_SCALE}
        )
    elif probe.dtype == "autocast":
        json["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if probe.optimizer == "muon":
        params = {"lr": ADAM_RATE, "momentum": MOMENTUM}
        adam = {"betas": BETAS, "eps": EPSILON, "weight_decay": 0.0, "torch_adam": True}
        json["optimizer"] = {"type": "Muon", "params": params | adam}
    return json | probe.json


def _initialize(probe: Probe, model: nn.Module) -> Any:
    import deepspeed

    named: dict[str, Any] = dict(model.named_parameters())
    arguments: dict[str, Any] = {"model": model, "config": deepspeed_json(probe)}
    if probe.optimizer == "muon":
        for name, parameter in named.items():
            # Its own rule since 0.18.2; before, it takes all matrices, or what it is told to take.
            parameter.use_muon = parameter.dim() >= 2 and "embed" not in name and "head" not in name
        arguments["model_parameters"] = list(named.values())
    else:
        (arguments["optimizer"],) = optimizers(probe.optimizer, named)
    return deepspeed.initialize(**arguments)[0]


def _train_engine(probe: Probe, rank: int) -> Record:
    engine = _initialize(probe, Model(probe.shape))
    named: dict[str, Any] = dict(engine.module.named_parameters())
    record = Record(
        [], [], {}, frozenset(n for n, p in named.items() if getattr(p, "use_muon", False))
    )
    for step in range(STEPS):
        if probe.overflow == step + 1:
            _step(engine, probe, step, rank, SPIKE)
        record.losses.append(_step(engine, probe, step, rank, 1.0))
        record.norms.append(_norm(engine))
    record.weights = _weights(engine.module)
    return record


def _step(engine: Any, probe: Probe, step: int, rank: int, factor: float) -> float:
    """Train one step on a loss times `factor`; its mean over this rank's micro batches."""
    total = 0.0
    for micro in range(probe.accumulation):
        tokens, labels = batch(step, micro * probe.ranks + rank)
        loss = engine(tokens, labels)
        if probe.shape.auxiliary:
            loss = loss + engine.module.auxiliary_loss(tokens)
        total += float(loss.detach())
        last = micro == probe.accumulation - 1
        if probe.loop == "boundary":
            engine.set_gradient_accumulation_boundary(last)
            engine.backward(loss / probe.accumulation)
        else:
            engine.backward(loss * factor)
        if last or probe.loop != "boundary":
            engine.step()
    return total / probe.accumulation


def _norm(engine: Any) -> float | None:
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def _weights(module: nn.Module) -> Weights:
    import deepspeed

    parameters = list(module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=hasattr(parameters[0], "ds_id")):
        return {n: p.detach().float().numpy().copy() for n, p in module.named_parameters()}


def _train_pipeline(probe: Probe) -> Record:
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    whole = Model(probe.shape)
    if probe.shape.tied:
        first = TiedLayerSpec("embed", Embedding)
        last = TiedLayerSpec("embed", Embedding, forward_fn=project)
    else:
        first, last = LayerSpec(Embedding), LayerSpec(Head)
    blocks = [LayerSpec(Block) for _ in range(BLOCKS)]
    interval = 1 if probe.shape.recompute else 0
    model = PipelineModule(
        [first, *blocks, last], num_stages=probe.stages, loss_fn=cross_entropy,
        partition_method="uniform", activation_checkpoint_interval=interval,
    )  # fmt: skip
    own = {_name_on_one_device(name): p for name, p in model.named_parameters()}
    values = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(values[name])
    engine = _initialize(probe, model)
    replica = int(engine.grid.get_data_parallel_rank())
    record = Record([], [], {})
    for step in range(STEPS):
        loss = engine.train_batch(_micro_batches(probe, step, replica))
        record.losses.append(float(loss))
        record.norms.append(_norm(engine))
    record.weights = {_name_on_one_device(n): w for n, w in _weights(engine.module).items()}
    return record


def _micro_batches(probe: Probe, step: int, replica: int) -> Iterator[tuple[Tensor, Tensor]]:
    replicas = probe.ranks // probe.stages
    for micro in range(probe.accumulation):
        yield batch(step, micro * replicas + replica)


def _name_on_one_device(name: str) -> str:
    """The name in `Model` of a parameter of the pipeline: "2.up.weight" is "blocks.1.up.weight"."""
    layer, _, rest = name.partition(".")
    if layer == "tied_modules":
        return rest
    place = int(layer)
    if place == 0:
        return f"embed.{rest}"
    return f"lm_head.{rest}" if place == BLOCKS + 1 else f"blocks.{place - 1}.{rest}"
