"""A timeline of every pipeline stage: the timed instructions of real training steps.

In each step, DeepSpeed's pipeline engine runs a list of instructions (load, receive, forward, send,
...). Each one is timed on each stage, for every schedule of `models/pipeline_schedules.py` and
several numbers of micro batches, in one launch with one engine. All ranks read the host's
CLOCK_MONOTONIC, so times of different stages are comparable. On a GPU, the stream of the passes is
synchronized around every instruction, which loses some overlap of messages with passes.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.layout import plan_layout
from launch.config.load import load_recipe
from launch.config.schema import Recipe
from launch.data.batch import Batch
from launch.errors import UserError
from launch.paths import ROOT
from launch.perf.trace_events import FORWARD, PASSES, WEIGHTS, Event, ScheduleRun

if TYPE_CHECKING:
    import torch
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from torch import nn

    from launch.training.setup import LocalEngine

WARMUP = 2  # steps before the timed ones, for each schedule and number of micro batches


@dataclass(frozen=True)
class Traced:
    """Results of a launch: the device's name, and a run per micro batch count and schedule."""

    device: str
    runs: list[ScheduleRun]


def check_pipeline(recipe: Recipe) -> None:
    """Reject a recipe without pipeline stages.

    Raises:
        UserError: naming the closest pipeline recipe, by name and then by number of ranks.
    """
    if recipe.parallel.pipeline > 1:
        return
    words = set(recipe.name.split("_"))

    def distance(other: Recipe) -> tuple[int, int, int]:
        parts, parallel = other.name.split("_"), other.parallel
        return -len(words & set(parts)), parallel.tensor * parallel.pipeline, len(parts)

    found = map(load_recipe, sorted((ROOT / "recipes").glob("*.yaml")))
    nearest = min((other for other in found if other.parallel.pipeline > 1), key=distance)
    raise UserError(
        "parallel.pipeline: one stage has nothing to wait for, so there is no bubble to show; use "
        f"--config recipes/{nearest.name}.yaml, or --set parallel.pipeline=2"
    )


def trace(
    recipe: Recipe, ranks: int, schedules: list[str], micro_batches: list[int], steps: int
) -> Traced:
    """Run `steps` steps per schedule and number of micro batches, on `ranks` local ranks.

    With several pipelines (data or tensor parallel size above 1), the first one is recorded. The
    global batch is micro batches x micro batch size x data parallel size.

    Raises:
        UserError: if the recipe does not fit the ranks, or a rank failed.
    """
    from launch.config.resolve import resolve
    from launch.runtime.local_launcher import run_local_ranks

    parallel, train = recipe.parallel, recipe.train
    data = max(1, ranks // (parallel.tensor * parallel.pipeline))
    all_steps = len(micro_batches) * len(schedules) * (WARMUP + steps + 1)
    changes = {
        "global_batch_size": max(micro_batches) * train.micro_batch_size * data,
        "steps": max(all_steps, train.steps),
    }
    recipe = recipe.model_copy(update={"train": train.model_copy(update=changes)})
    resolve(recipe, plan_layout(recipe, ranks))
    with tempfile.TemporaryDirectory(prefix="trace-") as folder:
        place = Path(folder)
        run_local_ranks(
            trace_rank, ranks, recipe.model_dump(), schedules, micro_batches, steps, place
        )
        found = [
            json.loads((place / f"stage{stage}.json").read_text())
            for stage in range(parallel.pipeline)
        ]
    runs = [_merge(parts) for parts in zip(*(stage["runs"] for stage in found), strict=True)]
    return Traced(found[0]["device"], runs)


def _merge(parts: tuple[dict[str, Any], ...]) -> ScheduleRun:
    first = parts[0]
    steps = [
        [[Event(*event) for event in events] for events in stages]
        for stages in zip(*(part["steps"] for part in parts), strict=True)
    ]
    saved = [part["saved_bytes"] for part in parts]
    chunks = first["model_chunks"]
    return ScheduleRun(first["schedule"], first["micro_batches"], steps, saved, chunks)


def trace_rank(
    values: dict[str, Any], schedules: list[str], micro_batches: list[int], steps: int, folder: Path
) -> None:
    """Train and record; every rank calls it, and one rank per stage writes its record.

    Raises:
        UserError: as `launch/train.py`.
    """
    from launch.training.setup import local_engine

    with local_engine(values, folder) as local:
        import torch

        from launch.deepspeed_patches.pipeline import use_schedule

        engine: PipelineEngine = local.engine
        batch = local.batch(0)
        each = engine.train_micro_batch_size_per_gpu() * engine.dp_world_size
        runs = []
        for number in micro_batches:
            engine.set_train_batch_size(number * each)
            for schedule in schedules:
                if engine.module.model_chunks == 1:  # else the engine has its only one
                    use_schedule(engine, schedule)
                found = _record(local, _first(batch, number), steps)
                run = {"schedule": schedule, "micro_batches": number}
                runs.append({**run, "model_chunks": engine.module.model_chunks, **found})
        device = local.ranks.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        # The first rank of a stage has coordinate 0 along the other axes.
        ranks_per_stage = local.ranks.world_size // engine.num_stages
        if local.ranks.rank % ranks_per_stage == 0:
            file = folder / f"stage{engine.stage_id}.json"
            file.write_text(json.dumps({"device": name, "runs": runs}))


def _first(batch: Batch, micro_batches: int) -> Batch:
    """The first micro batches of a batch without loss weights."""
    return replace(
        batch,
        tokens=batch.tokens[:micro_batches],
        labels=batch.labels[:micro_batches],
        positions=None if batch.positions is None else batch.positions[:micro_batches],
        total_weight=batch.total_weight * micro_batches / len(batch),
    )


def _record(local: "LocalEngine", batch: Batch, steps: int) -> dict[str, Any]:
    import torch.distributed as dist

    from launch.training.train_step import train_step

    engine, device = local.engine, local.ranks.device
    plain = engine._INSTRUCTION_MAP
    for _ in range(WARMUP):
        train_step(engine, batch)
    recorded = []
    for _ in range(steps):
        recorder = _Recorder(engine, device)
        engine._INSTRUCTION_MAP = {k: recorder.timed(k, run) for k, run in plain.items()}
        dist.barrier()  # all stages start together, whatever they did after the last step
        train_step(engine, batch)
        recorded.append(recorder.events)
    # In a separate step, because the hooks take time.
    saved = SavedBytes(engine.module)
    engine._INSTRUCTION_MAP = {
        k: saved.watched(run, k.__name__) if k.__name__ in PASSES else run
        for k, run in plain.items()
    }
    train_step(engine, batch)
    engine._INSTRUCTION_MAP = plain
    return {"steps": recorded, "saved_bytes": saved.peak}


Instruction = Callable[..., None]


class _Recorder:
    """The events of one step on this rank."""

    def __init__(self, engine: "PipelineEngine", device: "torch.device") -> None:
        self.events: list[Event] = []
        self._device = device
        # How a micro batch enters a stage: from the data, or from the previous stage.
        self._arrival = "LoadMicroBatch" if engine.is_first_stage() else "RecvActivation"
        self._arrived = self._weighed = 0
        self._in_buffer: dict[int | None, int] = {}

    def timed(self, kind: type, run: Instruction) -> Instruction:
        """The instruction, wrapped to be recorded whenever the engine runs it."""
        name = kind.__name__

        def recorded(engine: "PipelineEngine", **arguments: int) -> None:
            start = self._now()
            run(engine, **arguments)
            end = self._now()
            if name == "StartChunk":
                return
            buffer, chunk = arguments.get("buffer_id"), engine.module.chunk or 0
            if name == self._arrival:
                self._arrived += 1
                self._in_buffer[buffer] = self._arrived
            number = self._in_buffer.get(buffer)
            if engine.module.model_chunks > 1 and buffer is not None:
                number = buffer % engine.micro_batches + 1
            if name == WEIGHTS:  # in the order of arrival, from no buffer
                self._weighed += 1
                number = self._weighed
            self.events.append(Event(name, number, buffer, start, end, chunk))

        return recorded

    def _now(self) -> float:
        if self._device.type == "cuda":
            import torch

            # Not the device: a send of an interleaved pipeline may wait there for a stage that waits here.
            torch.cuda.current_stream(self._device).synchronize()
        return time.clock_gettime(time.CLOCK_MONOTONIC)


class _Kept:
    """A tensor that autograd saves; released as soon as its backward pass has used it."""

    def __init__(self, owner: "SavedBytes", tensor: "torch.Tensor") -> None:
        self.owner, self.tensor = owner, tensor
        storage = tensor.untyped_storage()
        self.key, self.size = storage.data_ptr(), storage.nbytes()
        owner.count(self.key, self.size, 1)

    def __del__(self) -> None:
        self.owner.count(self.key, self.size, -1)


@dataclass
class SavedBytes:
    """Bytes that autograd currently saves for backward passes; shared memory counts once.

    Parameters are excluded, and so are recomputed activations (`checkpoint_activations`). `waiting`
    are the bytes that wait for weight passes; the peak counts them too.
    """

    module: "nn.Module"
    live: int = 0
    waiting: int = 0
    peak: int = 0
    _holders: dict[int, int] = field(default_factory=dict)  # by address

    def __post_init__(self) -> None:
        """Mark parameters as already held: they are in memory anyway."""
        for parameter in self.module.parameters():
            self._holders[parameter.untyped_storage().data_ptr()] = 1

    def count(self, key: int, size: int, change: int) -> None:
        """Add or remove one holder of the `size` bytes of memory at address `key`."""
        before = self._holders.get(key, 0)
        self._holders[key] = before + change
        if before == 0:
            self.live += size
        elif before + change == 0:
            self.live -= size
        self.peak = max(self.peak, self.live + self.waiting)

    def watched(self, run: Instruction, name: str = FORWARD) -> Instruction:
        """A pass, wrapped to count what it leaves for later passes."""
        from torch.autograd.graph import saved_tensors_hooks

        def saving(engine: "PipelineEngine", **arguments: int) -> None:
            with saved_tensors_hooks(lambda t: _Kept(self, t), lambda kept: kept.tensor):
                run(engine, **arguments)

        def counted(engine: "PipelineEngine", **arguments: int) -> None:
            run(engine, **arguments)
            if (later := engine.module.later) is not None:
                storages = [tensor.untyped_storage() for tensor in later.tensors()]
                self.waiting = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
                self.peak = max(self.peak, self.live + self.waiting)

        return saving if name == FORWARD else counted
