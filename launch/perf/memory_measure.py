"""Measure a layout's memory: the peak of every rank, the phase of the step it lies in, and seconds.

The ranks train on random tokens, so that nothing is read or tokenized. On a GPU, memory is what
torch's allocator has handed out; on a CPU, the bytes of all tensors (`tensor_bytes.py`).
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.config.load import recipe_from_dict
from launch.config.schema import GPTModel, Recipe
from launch.data.batch import Batch
from launch.errors import UserError

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

    from launch.config.layout import Layout
    from launch.perf.tensor_bytes import Counter

STEPS = 5
WARMUP = 2  # in the first step a model is compiled and the optimizer's state is created


@dataclass(frozen=True)
class RankMemory:
    """One rank, in bytes. `peak` excludes the first step; `phases` has the peak of each phase.

    Attributes:
        device: the GPU's name, or "cpu".
        stage: the rank's pipeline stage.
        built: allocated once the engine is built.
        between: allocated between two steps.
        peak: the most that was allocated in a step.
        phases: the peak in forward, backward and step (no pipeline).
        left: allocated at the end of forward, backward and step.
        reserved: the most that the allocator had from the driver (GPU only).
        used: in use on the whole device, by the driver's count (GPU only).
        seconds: each step.
        losses: each step.
    """

    device: str
    rank: int
    stage: int
    built: int
    between: int
    peak: int
    phases: dict[str, int]
    left: dict[str, int]
    reserved: int
    used: int
    seconds: list[float]
    losses: list[float]

    @property
    def step_seconds(self) -> float:
        """The median step after warm-up."""
        return statistics.median(self.seconds[WARMUP:])


def measure(recipe: Recipe, ranks: int, steps: int = STEPS) -> list[RankMemory]:
    """Train a few steps on `ranks` local ranks, and return what each of them used.

    Raises:
        UserError: if the recipe does not fit the ranks, or a rank failed.
    """
    from launch.config.layout import plan_layout
    from launch.config.resolve import resolve
    from launch.runtime.fork_server import run_ranks
    from launch.runtime.process_group import threads_per_rank

    resolve(recipe, plan_layout(recipe, ranks))
    # CPU Adam takes as many threads as it gets; a launcher leaves a rank its share of the cores.
    env = {"OMP_NUM_THREADS": str(threads_per_rank(ranks))}
    try:
        return run_ranks(measure_rank, ranks, recipe.model_dump(), steps, env=env, show=None)
    except UserError:
        raise
    except Exception as error:  # a rank's own: out of memory, for example
        raise UserError(f"a rank failed: {type(error).__name__}: {error}") from error


def measure_rank(values: dict[str, Any], steps: int) -> RankMemory:
    """Build the engine and train; every rank calls it, and returns what it used.

    Raises:
        UserError: as `launch/train.py`.
    """
    from launch.runtime.process_group import prepare_environment

    prepare_environment()

    import gc
    import os

    import torch

    from launch.config.layout import plan_layout
    from launch.config.resolve import resolve
    from launch.ops.builder import use_private_cache
    from launch.perf.tensor_bytes import counter
    from launch.training.setup import join_grid

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    recipe = recipe_from_dict(values)
    layout = plan_layout(recipe, int(os.environ["WORLD_SIZE"]))
    ds_config = resolve(recipe, layout)
    use_private_cache()
    ranks, topology = join_grid(recipe, layout, ds_config)

    from launch.training.engine import build_engine
    from launch.training.train_step import train_step

    with counter(ranks.device) as count:
        engine = build_engine(recipe, ds_config, ranks, topology)
        gc.collect()
        built, peaks, between, seconds, losses = count.now(), [0], [0], [], []
        count.most()
        phases, left = _watch(engine, count)
        for step in range(steps):
            phases.clear()
            batch = random_batch(recipe, layout, seed=step)
            started = time.perf_counter()
            losses.append(
                train_step(engine, batch).loss
            )  # reads the loss, and so waits for the GPU
            seconds.append(time.perf_counter() - started)
            between.append(count.now())
            peaks.append(max(count.most(), *phases.values(), 0))
        return RankMemory(
            device=count.device,
            rank=ranks.rank,
            stage=topology.coordinates["pipeline"],
            built=built,
            between=between[-1],
            peak=max(peaks[2:] or peaks),
            phases=phases,
            left=left,
            reserved=count.reserved(),
            used=count.used(),
            seconds=seconds,
            losses=losses,
        )


def random_batch(recipe: Recipe, layout: "Layout", seed: int) -> Batch:
    """A rank's batch of random tokens; where rows hold documents, each has two."""
    import torch

    assert isinstance(recipe.model, GPTModel)
    sequence = recipe.data.sequence_length
    shape = (layout.accumulation, layout.micro_batch, sequence)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, recipe.model.shape.vocab, shape, generator=generator)
    positions = None
    if recipe.data.has_documents:
        positions = (torch.arange(sequence) % max(1, sequence // 2)).expand(shape).contiguous()
    weight = float(layout.global_batch * sequence)
    return Batch(tokens, tokens.roll(-1, -1), None, positions, weight)


def _watch(engine: "DeepSpeedEngine", count: "Counter") -> tuple[dict[str, int], dict[str, int]]:
    """Two mappings, from phase to its peak and to what is left at its end, filled at each step."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    phases: dict[str, int] = {}
    left: dict[str, int] = {}
    if isinstance(engine, PipelineEngine):
        return phases, left  # its phases overlap: a stage has several micro batches in flight

    def watched(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            count.most()
            result = run(*arguments, **named)
            phases[name] = max(phases.get(name, 0), count.most())
            left[name] = count.now()
            return result

        return call

    for name in ("forward", "backward", "step"):
        setattr(engine, name, watched(name, getattr(engine, name)))
    return phases, left
