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
from models.pipeline_schedules import SCHEDULES, KeepLoss, TakeLoss, WeightPass
from models.pipeline_stages import ideal_bubble, micro_batches_waiting

SIZES = [(stages, micro_batches) for stages in range(1, 6) for micro_batches in range(1, 9)]


@dataclass
class Buffer:
    """A micro batch on a stage, from what it is given to the last that it is needed for."""

    micro_batch: int
    labels: int | None = None
    loss: int | None = None
    done: set[str] = field(default_factory=set)


Durations = tuple[float, float, float]
UNIT: Durations = (1.0, 1.0, 1.0)


class Stage:
    """Runs one stage's instructions.

    A forward, backward and weight pass take the given units of time, and messages take none.
    """

    def __init__(
        self, schedule: str, micro_batches: int, stages: int, stage: int, takes: Durations
    ) -> None:
        plan = SCHEDULES[schedule](micro_batches, stages, stage)
        self.todo: deque[PipeInstruction] = deque(todo for step in plan.steps() for todo in step)
        self.buffers: list[Buffer | None] = [None] * plan.num_pipe_buffers()
        self.first, self.last = stage == 0, stage == stages - 1
        self.takes = takes
        self.now = 0.0
        self.loaded = self.peak = self.waiting = self.held = 0
        self.loss: int | None = None  # the engine's only one: the last forward pass's
        self.line: list[str] = []  # what it did in each unit of time, as the module draws it
        self.forwards: list[int] = []
        self.backwards: list[int] = []
        self.weights: list[int] = []

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
        """Forward or backward pass of a micro batch, or its weight pass."""
        if isinstance(todo, WeightPass):
            number, kind = len(self.weights), 2
            assert number < len(self.backwards), "no micro batch waits"
            self.weights.append(number)
        elif isinstance(todo, ForwardPass):
            buffer = self.buffer(todo.buffer_id, set(), "forward")
            assert not self.last or buffer.labels == buffer.micro_batch
            self.loss = buffer.micro_batch
            number, kind = buffer.micro_batch, 0
            self.forwards.append(number)
            self.peak = max(self.peak, len(self.forwards) - len(self.backwards))
            self.waiting = max(self.waiting, len(self.backwards) - len(self.weights))
            self.held = max(self.held, len(self.forwards) - len(self.weights))
        else:
            needs = {"forward"} if self.last else {"forward", "sent on", "got gradient"}
            buffer = self.buffer(todo.buffer_id, needs, "backward")
            assert not self.last or self.loss == buffer.micro_batch, "another one's loss"
            number, kind = buffer.micro_batch, 1
            self.backwards.append(number)
        self.line += ["."] * (round(self.now) - len(self.line))
        self.line.append(chr(ord("1Aa"[kind]) + number))
        self.now += self.takes[kind]

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
            if isinstance(todo, ForwardPass | BackwardPass | WeightPass):
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


def play(schedule: str, stages: int, micro_batches: int, takes: Durations = UNIT) -> list[Stage]:
    """Run a step on all stages, with sends and receives that wait for each other."""
    ranks = [Stage(schedule, micro_batches, stages, stage, takes) for stage in range(stages)]
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
        alive = {"gpipe": micro_batches, "naive": 1}.get(schedule, stages - number)
        assert stage.peak == min(alive, micro_batches)
        # What is left over was overwritten by nobody, and has been sent where it had to be.
        assert all(b is None or b.done == stage.whole_life() for b in stage.buffers)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_the_idle_share_is_the_ideal_bubble(schedule: str, stages: int, micro_batches: int) -> None:
    ranks = play(schedule, stages, micro_batches)
    length = max(rank.now for rank in ranks)
    for rank in ranks:
        idle = 1 - (len(rank.forwards) + len(rank.backwards) + len(rank.weights)) / length
        assert idle == pytest.approx(ideal_bubble(schedule, stages, micro_batches))


@pytest.mark.parametrize("takes", [(1.0, 1.3, 0.9), (1.0, 2.2, 0.9), (1.0, 1.4, 0.6)])
@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 8), (4, 8), (5, 16)])
def test_zero_bubble_waits_as_long_as_its_paper_says(
    stages: int, micro_batches: int, takes: Durations
) -> None:
    """arXiv:2401.10241: (p - 1) (F + B - W), where no pass is as long as another."""
    forward, backward, weight = takes
    ranks = play("zb-h1", stages, micro_batches, takes)
    expected = micro_batches * sum(takes) + (stages - 1) * (forward + backward - weight)
    assert max(rank.now for rank in ranks) == pytest.approx(expected)


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_zero_bubble_holds_no_more_micro_batches_than_1f1bs_first_stage(
    stages: int, micro_batches: int
) -> None:
    for number, stage in enumerate(play("zb-h1", stages, micro_batches)):
        assert stage.weights == list(range(micro_batches))
        assert stage.held == min(stages, micro_batches)
        waiting = micro_batches_waiting("zb-h1", stages, number, micro_batches)
        assert stage.waiting == waiting == stage.held - stage.peak


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_ends_with_reductions_and_the_optimizer(schedule: str) -> None:
    for stage in range(3):
        todo = [one for step in SCHEDULES[schedule](4, 3, stage).steps() for one in step]
        assert [type(one) for one in todo[-3:]] == [ReduceTiedGrads, ReduceGrads, OptimizerStep]
        assert sum(isinstance(one, OptimizerStep) for one in todo) == 1


def drawing(schedule: str, stage: int) -> str:
    """A stage's line in the module's drawing: three stages, four micro batches."""
    ranks = play(schedule, 3, 4)
    line = ranks[stage].line
    return " ".join(line + ["."] * (max(len(rank.line) for rank in ranks) - len(line)))


def test_the_drawing_is_what_happens() -> None:
    drawn = [" ".join(line.split()) for line in (schedules.__doc__ or "").splitlines()]
    for stage in range(3):
        lines = [drawing(schedule, stage) for schedule in ("gpipe", "1f1b")]
        split = "zb-h1 " if stage == 0 else ""
        assert f"{split}stage {stage} {drawing('zb-h1', stage)}" in drawn
        names = ("gpipe ", "1f1b ") if stage == 0 else ("", "")
        assert f"{names[0]}stage {stage} {lines[0]} {names[1]}{lines[1]}" in drawn


def test_an_unknown_schedule_has_no_bubble() -> None:
    with pytest.raises(KeyError):
        ideal_bubble("zigzag", 2, 4)
