"""The pipeline schedules, played through: no rank waits for ever, and the module's table is true."""

from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    ReduceTiedGrads,
    SendActivation,
    SendGrad,
)

from models import pipeline_schedules as schedules
from models.pipeline_schedules import SCHEDULES, KeepLoss, TakeLoss
from models.pipeline_stages import ideal_bubble

SIZES = [(stages, micro_batches) for stages in range(1, 6) for micro_batches in range(1, 9)]


@dataclass
class Buffer:
    """A micro batch on a stage, from what it is given to the last that it is needed for."""

    micro_batch: int
    labels: int | None = None
    loss: int | None = None
    done: set[str] = field(default_factory=set)


class Stage:
    """Runs one stage's instructions. A pass takes one unit of time, and messages take none."""

    def __init__(self, schedule: str, micro_batches: int, stages: int, stage: int) -> None:
        plan = SCHEDULES[schedule](micro_batches, stages, stage)
        self.todo: deque[PipeInstruction] = deque(todo for step in plan.steps() for todo in step)
        self.buffers: list[Buffer | None] = [None] * plan.num_pipe_buffers()
        self.first, self.last = stage == 0, stage == stages - 1
        self.now = self.loaded = self.peak = 0
        self.loss: int | None = None  # the engine's only one: the last forward pass's
        self.line: list[str] = []  # what it did in each unit of time, as the module draws it
        self.forwards: list[int] = []
        self.backwards: list[int] = []

    def whole_life(self) -> set[str]:
        """What a buffer must have seen before it may be used again."""
        messages = set() if self.last else {"sent on", "got gradient"}
        return {"forward", "backward", *messages, *(set() if self.first else {"sent back"})}

    def give(self, index: int, micro_batch: int) -> None:
        """Put a micro batch into a buffer, which must not be in use."""
        old = self.buffers[index]
        assert old is None or old.done == self.whole_life(), f"{old} is overwritten"
        self.buffers[index] = Buffer(micro_batch)

    def buffer(self, index: int, needs: set[str], adds: str) -> Buffer:
        """The buffer of an instruction, which comes after `needs` and has not run yet."""
        buffer = self.buffers[index]
        assert buffer is not None and needs <= buffer.done and adds not in buffer.done
        buffer.done.add(adds)
        return buffer

    def load(self, index: int) -> None:
        """Tokens on the first stage, labels on the last; the loader gives one after another."""
        if self.first:
            self.give(index, self.loaded)
        buffer = self.buffers[index]
        assert buffer is not None and "forward" not in buffer.done
        if self.last:
            assert buffer.micro_batch == self.loaded, "labels of another micro batch"
            buffer.labels = self.loaded
        self.loaded += 1

    def compute(self, todo: PipeInstruction) -> None:
        """Forward or backward of a micro batch."""
        if isinstance(todo, ForwardPass):
            buffer = self.buffer(todo.buffer_id, set(), "forward")
            assert not self.last or buffer.labels == buffer.micro_batch
            self.loss = buffer.micro_batch
            self.forwards.append(buffer.micro_batch)
            self.peak = max(self.peak, len(self.forwards) - len(self.backwards))
        else:
            needs = {"forward"} if self.last else {"forward", "sent on", "got gradient"}
            buffer = self.buffer(todo.buffer_id, needs, "backward")
            assert not self.last or self.loss == buffer.micro_batch, "another one's loss"
            self.backwards.append(buffer.micro_batch)
        self.line += ["."] * (self.now - len(self.line))
        start = "1" if isinstance(todo, ForwardPass) else "A"
        self.line.append(chr(ord(start) + buffer.micro_batch))
        self.now += 1

    def keep_or_take_loss(self, todo: KeepLoss | TakeLoss) -> None:
        """Put the engine's loss into the micro batch's buffer, or back."""
        buffer = self.buffers[todo.buffer_id]
        assert buffer is not None
        if isinstance(todo, KeepLoss):
            buffer.loss = self.loss
        else:
            self.loss = buffer.loss

    def alone(self) -> bool:
        """Run what needs no other stage; whether there was any."""
        before = len(self.todo)
        while self.todo and not isinstance(
            self.todo[0], SendActivation | RecvActivation | SendGrad | RecvGrad
        ):
            todo = self.todo.popleft()
            if isinstance(todo, ForwardPass | BackwardPass):
                self.compute(todo)
            elif isinstance(todo, LoadMicroBatch):
                self.load(todo.buffer_id)
            elif isinstance(todo, KeepLoss | TakeLoss):
                self.keep_or_take_loss(todo)
            else:
                assert isinstance(todo, ReduceTiedGrads | ReduceGrads | OptimizerStep)
                assert len(self.todo) <= 2, "a step before the end"
        return len(self.todo) < before


def meet(stage: Stage, following: Stage) -> bool:
    """Let a stage and the next one talk, where both wait to: neither goes on alone."""
    if not (stage.todo and following.todo):
        return False
    here, there = stage.todo[0], following.todo[0]
    if isinstance(here, SendActivation) and isinstance(there, RecvActivation):
        sent = stage.buffer(here.buffer_id, {"forward"}, "sent on")
        following.give(there.buffer_id, sent.micro_batch)
    elif isinstance(here, RecvGrad) and isinstance(there, SendGrad):
        sent = following.buffer(there.buffer_id, {"backward"}, "sent back")
        got = stage.buffer(here.buffer_id, {"forward", "sent on"}, "got gradient")
        assert got.micro_batch == sent.micro_batch
    else:
        return False
    stage.todo.popleft()
    following.todo.popleft()
    stage.now = following.now = max(stage.now, following.now)
    return True


def play(schedule: str, stages: int, micro_batches: int) -> list[Stage]:
    """Run a step on all stages, with sends and receives that wait for each other."""
    ranks = [Stage(schedule, micro_batches, stages, stage) for stage in range(stages)]
    while any(rank.todo for rank in ranks):
        moved = [rank.alone() for rank in ranks]
        moved += [meet(*pair) for pair in pairwise(ranks)]
        assert any(moved), f"deadlock: {[list(rank.todo)[:1] for rank in ranks]}"
    return ranks


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_every_micro_batch_goes_there_and_back(
    schedule: str, stages: int, micro_batches: int
) -> None:
    everything = list(range(micro_batches))
    for number, stage in enumerate(play(schedule, stages, micro_batches)):
        assert stage.forwards == stage.backwards == everything
        alive = {"1f1b": stages - number, "gpipe": micro_batches, "naive": 1}[schedule]
        assert stage.peak == min(alive, micro_batches)
        # What is left over was overwritten by nobody, and has been sent where it had to be.
        assert all(b is None or b.done == stage.whole_life() for b in stage.buffers)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_the_idle_share_is_the_ideal_bubble(schedule: str, stages: int, micro_batches: int) -> None:
    ranks = play(schedule, stages, micro_batches)
    length = max(rank.now for rank in ranks)
    for rank in ranks:
        idle = 1 - (len(rank.forwards) + len(rank.backwards)) / length
        assert idle == pytest.approx(ideal_bubble(schedule, stages, micro_batches))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_ends_with_reductions_and_the_optimizer(schedule: str) -> None:
    for stage in range(3):
        todo = [one for step in SCHEDULES[schedule](4, 3, stage).steps() for one in step]
        assert [type(one) for one in todo[-3:]] == [ReduceTiedGrads, ReduceGrads, OptimizerStep]
        assert sum(isinstance(one, OptimizerStep) for one in todo) == 1


def test_the_drawing_is_what_happens() -> None:
    drawn = [" ".join(line.split()) for line in (schedules.__doc__ or "").splitlines()]
    for stage in range(3):
        lines = []
        for schedule in ("gpipe", "1f1b"):
            ranks = play(schedule, 3, 4)
            length = max(rank.now for rank in ranks)
            line = ranks[stage].line
            lines.append(" ".join(line + ["."] * (length - len(line))))
        names = ("gpipe ", "1f1b ") if stage == 0 else ("", "")
        assert f"{names[0]}stage {stage} {lines[0]} {names[1]}{lines[1]}" in drawn


def test_an_unknown_schedule_has_no_bubble() -> None:
    with pytest.raises(KeyError):
        ideal_bubble("zigzag", 2, 4)
