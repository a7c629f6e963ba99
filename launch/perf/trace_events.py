"""The events of pipeline steps, and the bubble and live micro batches computed from them.

The bubble is the idle share of a step. With T the time from the first instruction of any stage to
the end of the last pass of any stage,

    idle share of a stage = 1 - (time in its forward, backward and weight passes) / T
    bubble                = mean of the idle shares over the stages

Waiting in a send or receive counts as idle, as do messages and data loading. T excludes everything
after the last pass (gradient reduction, optimizer).
"""

import statistics
from dataclasses import dataclass
from typing import NamedTuple

from models.pipeline_stages import chunk_passes_alive, ideal_bubble, micro_batches_alive

FORWARD, BACKWARD, WEIGHTS = "ForwardPass", "BackwardPass", "WeightPass"
PASSES = (FORWARD, BACKWARD, WEIGHTS)


class Event(NamedTuple):
    """One instruction on one stage. Micro batches count from 1; times are in host-clock seconds.

    `micro_batch` and `buffer` are None for instructions on the whole batch: reductions, optimizer. `chunk`
    is the stage's model chunk, from 0.
    """

    instruction: str
    micro_batch: int | None
    buffer: int | None
    start: float
    end: float
    chunk: int = 0


Stages = list[list[Event]]  # one step: the events of each stage in their order


def idle_shares(stages: Stages) -> list[float]:
    """The idle share of each stage in one step, as defined at the top of this file."""
    begin, end = span(stages)
    shares = []
    for events in stages:
        busy = sum(e.end - e.start for e in events if e.instruction in PASSES)
        shares.append(1 - busy / (end - begin))
    return shares


def span(stages: Stages) -> tuple[float, float]:
    """Start of a step's first instruction and end of its last pass, over all stages."""
    begin = min(e.start for events in stages for e in events)
    return begin, max(e.end for events in stages for e in events if e.instruction in PASSES)


def peak_live(events: list[Event]) -> int:
    """Peak number of forward passes done whose backward pass is not."""
    live = peak = 0
    for event in events:
        live += (event.instruction == FORWARD) - (event.instruction == BACKWARD)
        peak = max(peak, live)
    return peak


@dataclass(frozen=True)
class ScheduleRun:
    """The timed steps of one schedule with one number of micro batches.

    With several model chunks a stage, a micro batch passes it once for each. `saved_bytes` is each
    stage's peak of the bytes that autograd saved for backward passes, without the parameters, measured in
    one untimed step.
    """

    schedule: str
    micro_batches: int
    steps: list[Stages]
    saved_bytes: list[int]
    model_chunks: int = 1

    def idle(self) -> list[float]:
        """The idle share of each stage, the median over the steps."""
        by_step = [idle_shares(stages) for stages in self.steps]
        return [statistics.median(shares) for shares in zip(*by_step, strict=True)]

    def bubble(self) -> float:
        """The idle share of a step, the median over the steps."""
        return statistics.median(statistics.mean(idle_shares(stages)) for stages in self.steps)

    def ideal(self) -> float:
        """What `bubble` is at best."""
        return ideal_bubble(
            self.schedule, len(self.saved_bytes), self.micro_batches, self.model_chunks
        )

    def seconds(self) -> float:
        """From the first instruction to the last backward pass, the median over the steps."""
        return statistics.median(end - begin for begin, end in map(span, self.steps))

    def live(self) -> list[int]:
        """The peak of live micro batches on each stage, counted once for each chunk."""
        by_stage = zip(*self.steps, strict=True)
        return [max(peak_live(events) for events in steps) for steps in by_stage]

    def expected(self) -> list[int]:
        """The expected value of `live`."""
        stages, m = len(self.saved_bytes), self.micro_batches
        if self.model_chunks > 1:
            return [
                max(
                    sum(alive)
                    for _, alive in chunk_passes_alive(stages, stage, m, self.model_chunks)
                )
                for stage in range(stages)
            ]
        return [micro_batches_alive(self.schedule, stages, stage, m) for stage in range(stages)]

    def typical(self) -> Stages:
        """The step to show: the one with the median bubble."""
        ranked = sorted(self.steps, key=lambda stages: statistics.mean(idle_shares(stages)))
        return ranked[(len(ranked) - 1) // 2]
