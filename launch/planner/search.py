"""Try every layout of a model on a cluster: what composes, what fits, and how long a step takes.

What composes is decided by the same checks as in training (`launch/config/`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launch.config.compatibility import check_composition
from launch.config.layout import Layout, plan_layout
from launch.config.parallel_rules import check_parallel
from launch.config.resolve import resolve
from launch.config.schema import GPTModel, Parallel, Recipe
from launch.errors import UserError
from launch.memory.estimate import StageMemory, estimate_stages
from launch.planner.cards import SPARE, Card, outside
from launch.planner.step_time import StepTime, step_time
from models.config import flops_per_token

# In the order of a reader's interest: the first is plain data parallelism.
CONFIGS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload_cpu", "zero3_offload_cpu")
_PIPELINES_AT_MOST = 32


@dataclass(frozen=True)
class Cluster:
    """`hosts` hosts with `gpus` cards each; memory of a host in GiB, None if unknown."""

    card: Card
    gpus: int
    hosts: int = 1
    host_gib: float | None = None
    network_gbs: float = 50.0

    @property
    def ranks(self) -> int:
        """All GPUs."""
        return self.gpus * self.hosts

    def describe(self) -> str:
        """For example "8 x h100 of 79.1 GiB"."""
        hosts = f" on {self.hosts} hosts" if self.hosts > 1 else ""
        return f"{self.ranks} x {self.card.name} of {self.card.gib:g} GiB{hosts}"


@dataclass(frozen=True)
class Plan:
    """A layout, its memory on each pipeline stage, and its step time."""

    recipe: Recipe
    layout: Layout
    ds_config: dict[str, Any]
    stages: list[StageMemory]
    time: StepTime
    cluster: Cluster

    @property
    def fullest(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def outside(self) -> float:
        """GiB a rank outside torch's allocator: CUDA's context and NCCL."""
        grid, config = self.layout.grid, self.config
        kind = next((axis for axis in ("pipeline", "tensor") if grid[axis] > 1), "data")
        if config.startswith("zero3"):
            kind = "zero3"
        return outside(kind, grid.world_size)

    @property
    def gib(self) -> float:
        """GiB on the fullest GPU, all in all."""
        return self.fullest.total + self.outside

    @property
    def host_gib(self) -> float:
        """GiB of host memory on each host, for what is offloaded."""
        return max(stage.host_total for stage in self.stages) * self.cluster.gpus

    @property
    def fits(self) -> bool:
        """Whether GPUs and hosts have the memory."""
        room = self.cluster.host_gib
        on_hosts = room is None or self.host_gib <= room
        return on_hosts and self.gib <= self.cluster.card.gib * (1 - SPARE)

    @property
    def config(self) -> str:
        """The name of the DeepSpeed JSON: zero2, or zero3_offload_cpu."""
        return str(self.recipe.deepspeed["config"]).rpartition("/")[2].removesuffix(".json")

    @property
    def plain(self) -> bool:
        """Whether this is plain data parallelism: whole model, gradients and optimizer on each GPU."""
        parallel = self.recipe.parallel
        checkpoint = self.recipe.model.checkpoint_activations
        return self.config == "zero0" and parallel.model_parallel_size == 1 and not checkpoint

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        tokens = self.layout.global_batch * self.recipe.data.sequence_length
        return tokens / self.time.total

    @property
    def mfu(self) -> float:
        """The share of the cards' peak that goes into the model's own FLOPs."""
        assert isinstance(self.recipe.model, GPTModel)
        flops = flops_per_token(self.recipe.model.shape, self.recipe.data.sequence_length)
        peak = self.cluster.card.tflops * 1e12 * self.cluster.ranks
        return self.tokens_per_second * flops / peak

    def name(self) -> str:
        """For example "ZeRO-1, tensor 2, micro batch 4, checkpointing"."""
        parallel = self.recipe.parallel
        stage, _, offload = self.config.removeprefix("zero").partition("_")
        parts = [f"ZeRO-{stage}" if stage != "0" else "data parallel"]
        if offload:
            parts[0] += " with offload"
        for axis, degree in (("tensor", parallel.tensor), ("pipeline", parallel.pipeline)):
            if degree > 1:
                parts.append(
                    f"{axis} {degree}"
                    + (" (sequence)" if parallel.sequence and axis == "tensor" else "")
                )
        parts.append(f"micro batch {self.layout.micro_batch}")
        if self.recipe.model.checkpoint_activations:
            parts.append("checkpointing")
        return ", ".join(parts)


def search(base: Recipe, cluster: Cluster) -> list[Plan]:
    """The best plan of each layout: the fastest that fits, or else the smallest; fastest first.

    Those that do not fit come last, the smallest of them first.
    """
    best: dict[Any, Plan] = {}
    for plan in every_plan(base, cluster):
        key = plan.config, plan.recipe.parallel, plan.recipe.model.checkpoint_activations
        if key not in best or _rank(plan) < _rank(best[key]):
            best[key] = plan
    return sorted(best.values(), key=_rank)


def _rank(plan: Plan) -> tuple[bool, float]:
    return not plan.fits, plan.time.total if plan.fits else plan.gib


def every_plan(base: Recipe, cluster: Cluster) -> Iterator[Plan]:
    """Every layout that composes, with every micro batch size that is a power of two."""
    assert isinstance(base.model, GPTModel)
    for config in CONFIGS:
        checked = _Checked(base, config)
        for parallel in _degrees(cluster):
            for again in (True,) if base.model.cpu_checkpointing else (False, True):
                recipe = _with(base, config, parallel, again)
                yield from _micro_batches(recipe, checked, cluster)


class _Checked:
    """A DeepSpeed JSON, read and linted once; what composes with it is checked for each layout."""

    def __init__(self, base: Recipe, config: str) -> None:
        recipe = _with(base, config, Parallel(), False)
        eager = recipe.train.model_copy(update={"compile": False, "cuda_graphs": False})
        alone = recipe.model_copy(update={"train": eager})
        self._json = resolve(alone, plan_layout(alone, 1))
        self._composes: set[tuple[Parallel, bool]] = set()

    def json(self, recipe: Recipe, layout: Layout) -> dict[str, Any]:
        """The JSON, if the layout composes. Its batch sizes, which the estimates do not read, are not set.

        Raises:
            UserError: as `check_composition`.
        """
        key = recipe.parallel, recipe.train.compile
        if key not in self._composes:
            check_composition(recipe, self._json, layout)
            self._composes.add(key)
        return self._json


def _degrees(cluster: Cluster) -> Iterator[Parallel]:
    powers = [2**n for n in range(12) if 2**n <= cluster.ranks]
    for tensor in powers:
        if tensor > cluster.gpus:
            continue  # its ranks talk in every layer, over the link inside a host
        for pipeline in powers:
            if tensor * pipeline > cluster.ranks or pipeline > _PIPELINES_AT_MOST:
                continue
            for sequence in (False, True) if tensor > 1 else (False,):
                yield Parallel(tensor=tensor, pipeline=pipeline, sequence=sequence)


def _with(base: Recipe, config: str, parallel: Parallel, again: bool) -> Recipe:
    kept = {key: base.deepspeed[key] for key in ("optimizer",) if key in base.deepspeed}
    return base.model_copy(
        update={
            "model": base.model.model_copy(update={"checkpoint_activations": again}),
            "parallel": parallel,
            "deepspeed": {"config": f"ds_configs/{config}.json", **kept},
        }
    )


def _micro_batches(recipe: Recipe, checked: _Checked, cluster: Cluster) -> Iterator[Plan]:
    micro = 1
    while micro <= recipe.train.global_batch_size:
        train = recipe.train.model_copy(update={"micro_batch_size": micro})
        sized = recipe.model_copy(update={"train": train})
        try:
            check_parallel(sized)
            layout = plan_layout(sized, cluster.ranks)
            if layout.micro_batch < micro:
                return
            plan = evaluate(sized, layout, checked.json(sized, layout), cluster)
        except UserError:
            if not recipe.train.compile:
                return
            # What is not compiled may compose.
            eager = recipe.train.model_copy(update={"compile": False})
            again = recipe.model_copy(update={"train": eager})
            yield from _micro_batches(again, checked, cluster)
            return
        yield plan
        if plan.fullest.total > 4 * cluster.card.gib:
            return
        micro *= 2


def evaluate(recipe: Recipe, layout: Layout, ds_config: dict[str, Any], cluster: Cluster) -> Plan:
    """One layout's memory and step time."""
    return Plan(
        recipe,
        layout,
        ds_config,
        estimate_stages(recipe, layout, ds_config),
        step_time(recipe, layout, ds_config, cluster.card, cluster.hosts, cluster.network_gbs),
        cluster,
    )
