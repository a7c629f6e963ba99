"""Predict the time of an optimizer step: a roofline with constants fitted to measurements.

Each term is the time that some work would take at the data sheet's rate: FLOPs over the peak, or bytes
over a bandwidth. `COST` has what the work takes in practice, as a multiple of that. The multiples were
fitted (least squares of the relative error, none below its bound) to 141 step times on H200s, torch
2.11, those of offload and of sequence parallelism to 24 more; recipes/MEMORY.md has the errors. They
order layouts; they do not replace a measurement.

A GPU waits for the host if a step has too little work: kernels are launched one by one, `LAUNCH`
milliseconds for a block's forward and backward pass. The slower of the two counts.
"""

from dataclasses import dataclass
from typing import Any

from launch.config.layout import Layout
from launch.config.schema import GPTModel, Recipe
from launch.ds_json.view import offload_device, zero_stage
from launch.memory.activations import activations, compiled, precision
from launch.memory.chunks import chunks_of_stages
from launch.memory.shapes import count, stage_shapes
from launch.memory.state import wrapper
from launch.planner.cards import Card
from models.config import GPTConfig, flops_per_token
from models.pipeline_stages import ideal_bubble

# Multiples of the data sheet's time. Matrix products run at four fifths of the peak at best.
COST = {
    "matmul": 1.25, "attention": 1.5, "eager": 26.5, "compiled": 35.2, "rotary": 53.0, "logits": 8.0,
    "autocast": 47.0, "state": 4.0, "zero12": 3.4, "zero3": 6.2, "data": 2.0, "tensor": 4.5,
    "host": 2.4,
}  # fmt: skip
# Milliseconds on the host for a block and micro batch, and for a step.
LAUNCH = {
    "eager": 0.6, "compiled": 0.9, "rotary": 1.9, "again": 2.3, "zero3": 3.4, "sequence": 4.1,
    "step": 50.6,
}  # fmt: skip
# CPU Adam reads and writes 28 bytes a parameter in fp32, at a rate that the ranks of a host share. This one
# was fitted on 16 cores beside one H200; all cores of a server reach more.
HOST_MEMORY_GBS = 94.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they go to; `total` is their sum."""

    compute: float
    communication: float
    bubble: float
    update: float
    transfer: float

    @property
    def total(self) -> float:
        """Seconds."""
        return self.compute + self.communication + self.bubble + self.update + self.transfer


def device_terms(
    recipe: Recipe, layout: Layout, ds_config: dict[str, Any], card: Card, first: int, last: int
) -> dict[str, float]:
    """A micro batch's work on a rank of a stage, in seconds at the data sheet's rates."""
    assert isinstance(recipe.model, GPTModel)
    c, tensor = recipe.model.shape, layout.grid["tensor"]
    tokens = layout.micro_batch * recipe.data.sequence_length
    blocks = max(0, min(last, c.layers + 2) - max(first, 2))
    again = 4 / 3 if recipe.model.checkpoint_activations else 1.0
    memory = card.memory_tbs * 1e12
    whole = flops_per_token(c, recipe.data.sequence_length)
    head = 6.0 * c.vocab * c.hidden
    head_again = 4 / 3 if recipe.model.loss_chunks > 1 else 1.0
    mlp_again = 2.0 * c.hidden * c.ffn * (3 if c.mlp == "swiglu" else 2)  # a forward pass
    attention = 12.0 * c.heads * c.head_dim * recipe.data.sequence_length
    per_block = (whole - head) / c.layers - attention
    peak = card.tflops * 1e12 * tensor
    # Elements of the residual stream and of the MLP that each elementwise operation passes over.
    passes = blocks * again * tokens
    stream = c.hidden + c.ffn * (2 if c.mlp == "swiglu" else 1) / tensor
    eager = 0.0 if recipe.train.compile else 2.0 * passes * stream / memory
    rotated = (c.heads + c.kv_heads) * c.head_dim / tensor * _rotary(c)
    return {
        "matmul": tokens
        * (
            blocks * (per_block * again + (mlp_again if recipe.model.mlp_chunks > 1 else 0))
            + (head * head_again if last == c.layers + 4 else 0)
        )
        / peak,
        "attention": passes * attention / peak,
        "eager": eager,
        "compiled": 2.0 * passes * stream / memory if recipe.train.compile else 0.0,
        "rotary": 0.0 if recipe.train.compile else passes * rotated / memory,
        "logits": (12.0 * tokens * c.vocab / tensor / memory if last == c.layers + 4 else 0.0)
        * (1 / 3 if recipe.train.compile else 1.0),
        "autocast": 2.0 * passes * c.hidden / memory if precision(ds_config).casts else 0.0,
    }


def _rotary(config: GPTConfig) -> float:
    """Bytes per element that rotary positions compute in fp32, and norms of queries and keys."""
    return (4.0 if config.position == "rope" else 0.0) + (2.0 if config.qk_norm else 0.0)


def state_terms(
    parameters: int, layout: Layout, ds_config: dict[str, Any], card: Card
) -> dict[str, float]:
    """A step's passes over weights, gradients and optimizer on a rank, in seconds at full bandwidth."""
    memory = card.memory_tbs * 1e12
    stage = zero_stage(ds_config)
    accumulate = 10.0 * parameters * layout.accumulation / memory
    update = 28.0 * parameters / (layout.grid["data"] if stage else 1) / memory
    offloaded = offload_device(ds_config, "offload_optimizer") != "none"
    return {
        "state": accumulate + (0.0 if offloaded else update),
        "zero12": accumulate if wrapper(ds_config) == "zero12" else 0.0,
        "zero3": accumulate if stage == 3 else 0.0,
    }


def launch_seconds(recipe: Recipe, layout: Layout, ds_config: dict[str, Any], blocks: int) -> float:
    """What the host needs to launch a step's kernels."""
    assert isinstance(recipe.model, GPTModel)
    c, graph = recipe.model.shape, compiled(recipe, layout, ds_config)
    each = LAUNCH["eager" if graph == "no" else "compiled"]
    if graph == "no":
        each += LAUNCH["rotary"] * (0.5 * (c.position == "rope") + 0.5 * c.qk_norm)
    if graph != "model":  # else the graph has what is computed again
        each += LAUNCH["again"] * recipe.model.checkpoint_activations
    each += LAUNCH["zero3"] * (zero_stage(ds_config) == 3)
    each += LAUNCH["sequence"] * recipe.parallel.sequence
    return (each * blocks * layout.accumulation + LAUNCH["step"]) / 1000


def traffic(
    recipe: Recipe,
    layout: Layout,
    ds_config: dict[str, Any],
    parameters: int,
    links: dict[str, float],
) -> dict[str, float]:
    """Seconds at full bandwidth that a rank sends: models/README.md has the volumes.

    `links` has bytes per second along each axis of the grid.
    """
    assert isinstance(recipe.model, GPTModel)
    c, grid, m = recipe.model.shape, layout.grid, layout.accumulation
    ring_data = (grid["data"] - 1) / grid["data"]
    payload = {0: 8.0, 1: 6.0, 2: 4.0 * m + 2.0, 3: (2.0 + 4.0) * m}[zero_stage(ds_config)]
    tokens = layout.micro_batch * recipe.data.sequence_length * m
    ring = 2.0 * (grid["tensor"] - 1) / grid["tensor"]
    again = 1.25 if recipe.model.checkpoint_activations else 1.0
    layers = c.layers / grid["pipeline"]
    sends = 2.0 * (2 if grid["pipeline"] > 1 else 0)
    return {
        "data": payload * parameters * ring_data / links["data"],
        "tensor": again * 4 * layers * 2.0 * c.hidden * tokens * ring / links["tensor"],
        "pipeline": sends * recipe.parallel.model_chunks * c.hidden * tokens / links["pipeline"],
    }


def step_time(
    recipe: Recipe,
    layout: Layout,
    ds_config: dict[str, Any],
    card: Card,
    hosts: int = 1,
    network_gbs: float = 50.0,
) -> StepTime:
    """A step's seconds on `hosts` hosts of equally many cards.

    `network_gbs` is a GPU's share of the network between hosts, in GB/s.
    """
    assert isinstance(recipe.model, GPTModel)
    config, grid, m = recipe.model.shape, layout.grid, layout.accumulation
    stages = grid["pipeline"]
    chunks_of_each = chunks_of_stages(config, stages, recipe.parallel)
    slowest, parameters = 0.0, 0
    for chunks in chunks_of_each:
        seconds, held = 0.0, 0
        for first, last in chunks:
            work = device_terms(recipe, layout, ds_config, card, first, last)
            seconds += sum(COST[name] * value for name, value in work.items())
            held += count(stage_shapes(config, grid["tensor"], first, last))
        slowest, parameters = max(slowest, seconds), max(parameters, held)
    state = sum(
        COST[name] * value
        for name, value in state_terms(parameters, layout, ds_config, card).items()
    )
    busy = max(
        m * slowest, launch_seconds(recipe, layout, ds_config, -(-config.layers // stages)) - state
    )
    idle = ideal_bubble(recipe.parallel.schedule, stages, m, recipe.parallel.model_chunks)
    sent = traffic(recipe, layout, ds_config, parameters, links(layout, card, hosts, network_gbs))
    transfer, update = _offload(ds_config, card, parameters, grid["data"], grid.world_size // hosts)
    if recipe.model.cpu_checkpointing:
        checkpoints = m * max(
            sum(activations(recipe, layout, ds_config, *ends).on_host for ends in chunks)
            for chunks in chunks_of_each
        )
        transfer += COST["host"] * 2.0 * checkpoints / (card.host_gbs * 1e9)  # there and back
    return StepTime(
        compute=busy,
        communication=COST["data"] * sent["data"]
        + COST["tensor"] * sent["tensor"]
        + sent["pipeline"],
        bubble=busy * idle / (1 - idle),
        update=state + update,
        transfer=transfer,
    )


def links(layout: Layout, card: Card, hosts: int, network_gbs: float) -> dict[str, float]:
    """Bytes per second between neighbours along each axis: inside a host, or over the network.

    Tensor ranks are neighbours, pipeline stages furthest apart (`models/parallel/grid.py`).
    """
    grid = layout.grid
    each = grid.world_size // hosts
    inside = {
        "tensor": grid["tensor"] <= each,
        "data": grid["tensor"] * grid["data"] <= each,
        "pipeline": hosts == 1,
    }
    return {axis: (card.link_gbs if near else network_gbs) * 1e9 for axis, near in inside.items()}


def _offload(
    ds_config: dict[str, Any], card: Card, parameters: int, data: int, on_host: int
) -> tuple[float, float]:
    """Seconds to move what is offloaded, and for the update on the host."""
    part, bus = parameters / data, card.host_gbs * 1e9
    moved = update = 0.0
    if offload_device(ds_config, "offload_optimizer") != "none":
        moved += (4.0 + 2.0) * part / bus  # gradients in fp32 to the host, weights back
        update = 28.0 * part * on_host / (HOST_MEMORY_GBS * 1e9)
    if offload_device(ds_config, "offload_param") != "none":
        moved += 2.0 * 2.0 * part / bus
    return COST["host"] * moved, update
