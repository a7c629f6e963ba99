"""The interleaved schedule, played through: no stage waits for ever, and each pass is in its place."""

from collections import defaultdict, deque
from dataclasses import dataclass, field

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

from launch.paths import ROOT
from models import pipeline_schedules as schedules
from models.pipeline_schedules import (
    InterleavedInference,
    InterleavedSchedule,
    KeepLoss,
    StartChunk,
    TakeLoss,
    train_schedule,
)
from models.pipeline_stages import (
    chunk_passes_alive,
    ideal_bubble,
    interleaved_passes,
    stage_chunks,
)

# Stages, micro batches (a multiple of them) and model chunks.
SIZES = [
    (stages, stages * groups, chunks)
    for stages in range(2, 6)
    for groups in range(1, 5)
    for chunks in range(2, 5)
]

Message = tuple[str, int, int]  # its kind, the part of the chain that sent it, the micro batch


@dataclass
class Stage:
    """A stage's instructions, run in their order; sends do not wait, receives do."""

    stage: int
    stages: int
    chunks: int
    todo: deque[PipeInstruction]
    forward: float = 1.0
    backward: float = 1.0
    now: float = 0.0
    chunk: int | None = None
    loaded: int = 0
    loss: int | None = None
    inputs: dict[int, tuple[int, int]] = field(default_factory=dict)  # part and micro batch
    losses: dict[int, int | None] = field(default_factory=dict)
    gradient: tuple[int, int] | None = None
    line: list[str] = field(default_factory=list)  # what it did in each unit of time
    done: list[tuple[bool, int, int]] = field(default_factory=list)
    alive: int = 0
    peak: int = 0

    @property
    def part(self) -> int:
        """The part of the chain that runs."""
        assert self.chunk is not None
        return self.chunk * self.stages + self.stage


class Ring:
    """Messages on their way, each direction and kind in the order of sending."""

    def __init__(self) -> None:
        self.links: dict[tuple[str, int], deque[tuple[float, Message]]] = defaultdict(deque)

    def send(self, kind: str, target: int, when: float, message: Message) -> None:
        self.links[kind, target].append((when, message))


def draw(one: Stage, sign: str) -> None:
    """As the module draws it: a dot for a unit of idle time, a prime for a pass of the second chunk."""
    one.line += ["."] * (round(one.now) - len(one.line))
    one.line.append(sign + "'" * bool(one.chunk))


def run(one: Stage, ring: Ring) -> bool:
    """Run a stage until it waits; whether it did anything."""
    moved = False
    last_part = one.stages * one.chunks - 1
    while one.todo:
        todo = one.todo[0]
        if isinstance(todo, RecvActivation | RecvGrad):
            kind = "activation" if isinstance(todo, RecvActivation) else "gradient"
            waiting = ring.links[kind, one.stage]
            if not waiting:
                return moved
            sent, (_, part, micro_batch) = waiting.popleft()
            one.now = max(one.now, sent)
            if kind == "activation":
                assert part == one.part - 1, "an activation of another part"
                assert todo.buffer_id not in one.inputs, "overwritten"
                one.inputs[todo.buffer_id] = (one.part, micro_batch)
            else:
                assert part == one.part + 1, "a gradient of another part"
                one.gradient = (one.part, micro_batch)
        elif isinstance(todo, StartChunk):
            one.chunk = todo.chunk
        elif isinstance(todo, LoadMicroBatch):
            if one.part == 0:
                one.inputs[todo.buffer_id] = (0, one.loaded)
            else:
                assert one.part == last_part
                assert one.inputs[todo.buffer_id] == (last_part, one.loaded), "another one's labels"
            one.loaded += 1
        elif isinstance(todo, ForwardPass):
            part, micro_batch = one.inputs[todo.buffer_id]
            assert part == one.part
            one.loss = micro_batch
            one.done.append((False, part, micro_batch))
            draw(one, chr(ord("1") + micro_batch))
            one.now += one.forward
            one.alive += 1
            one.peak = max(one.peak, one.alive)
        elif isinstance(todo, KeepLoss):
            one.losses[todo.buffer_id] = one.loss
        elif isinstance(todo, TakeLoss):
            one.loss = one.losses.pop(todo.buffer_id)
        elif isinstance(todo, BackwardPass):
            part, micro_batch = one.inputs[todo.buffer_id]
            assert part == one.part
            if part == last_part:
                assert one.loss == micro_batch, "another one's loss"
            else:
                assert one.gradient == (part, micro_batch), "another one's gradient"
            one.done.append((True, part, micro_batch))
            draw(one, chr(ord("A") + micro_batch))
            one.now += one.backward
            one.alive -= 1
            if part == 0:
                del one.inputs[todo.buffer_id]
        elif isinstance(todo, SendActivation):
            part, micro_batch = one.inputs[todo.buffer_id]
            target = (one.stage + 1) % one.stages
            ring.send("activation", target, one.now, ("activation", part, micro_batch))
        elif isinstance(todo, SendGrad):
            part, micro_batch = one.inputs.pop(todo.buffer_id)
            target = (one.stage - 1) % one.stages
            ring.send("gradient", target, one.now, ("gradient", part, micro_batch))
        else:
            assert isinstance(todo, ReduceTiedGrads | ReduceGrads | OptimizerStep)
            assert one.chunk is None, "a chunk's, not the stage's"
        one.todo.popleft()
        moved = True
    return moved


def play(
    stages: int, micro_batches: int, chunks: int, forward: float = 1.0, backward: float = 1.0
) -> list[Stage]:
    """Run a step on all stages."""
    ring, ranks = Ring(), []
    for stage in range(stages):
        plan = train_schedule("interleaved", micro_batches, stages, stage, chunks)
        todo = deque(one for step in plan.steps() for one in step)
        assert all(
            0 <= one.buffer_id < plan.num_pipe_buffers()
            for one in todo
            if "buffer_id" in one.kwargs
        )
        ranks.append(Stage(stage, stages, chunks, todo, forward, backward))
    while any(rank.todo for rank in ranks):
        moved = [run(rank, ring) for rank in ranks]
        assert any(moved), "deadlock"
    assert not any(ring.links.values()), "messages that nobody took"
    return ranks


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), SIZES)
def test_every_micro_batch_goes_round_and_back(
    stages: int, micro_batches: int, chunks: int
) -> None:
    for number, stage in enumerate(play(stages, micro_batches, chunks)):
        passes = [
            (backward, chunk * stages + number, micro_batch)
            for backward in (False, True)
            for chunk in range(chunks)
            for micro_batch in range(micro_batches)
        ]
        assert sorted(stage.done) == passes
        assert not stage.inputs
        most = max(
            sum(alive) for _, alive in chunk_passes_alive(stages, number, micro_batches, chunks)
        )
        bound = 2 * (stages - number) - 1 + (chunks - 1) * stages
        assert stage.peak == most == min(bound, chunks * micro_batches)


@pytest.mark.parametrize(("forward", "backward"), [(1.0, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), SIZES)
def test_the_idle_share_is_the_ideal_bubble(
    stages: int, micro_batches: int, chunks: int, forward: float, backward: float
) -> None:
    ranks = play(stages, micro_batches, chunks, forward, backward)
    length = max(rank.now for rank in ranks)
    busy = chunks * micro_batches * (forward + backward)
    ideal = ideal_bubble("interleaved", stages, micro_batches, chunks)
    assert 1 - busy / length == pytest.approx(ideal)
    assert ideal < ideal_bubble("1f1b", stages, micro_batches)


@pytest.mark.parametrize("micro_batches", range(1, 10))
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_inference_takes_any_number_of_micro_batches(stages: int, micro_batches: int) -> None:
    chunks, ring = 3, Ring()
    ranks = []
    for stage in range(stages):
        plan = InterleavedInference(micro_batches, stages, stage, chunks)
        todo = [one for step in plan.steps() for one in step]
        assert not any(isinstance(one, KeepLoss | BackwardPass) for one in todo)
        # One buffer serves all passes here: give each its own, to see that none is mistaken.
        for place, one in enumerate(list(todo)):
            if isinstance(one, StartChunk) and one.chunk is not None:
                for mine in todo[place + 1 : place + 5]:
                    if isinstance(mine, StartChunk):
                        break
                    mine.buffer_id = place
        ranks.append(Stage(stage, stages, chunks, deque(todo)))
    while any(rank.todo for rank in ranks):
        moved = [run(rank, ring) for rank in ranks]
        assert any(moved), "deadlock"
    for number, rank in enumerate(ranks):
        assert sorted(rank.done) == [
            (False, chunk * stages + number, micro_batch)
            for chunk in range(chunks)
            for micro_batch in range(micro_batches)
        ]
        assert rank.chunk is None


def test_a_step_ends_with_reductions_and_the_optimizer() -> None:
    todo = [one for step in InterleavedSchedule(4, 2, 1, 2).steps() for one in step]
    ends = [StartChunk, ReduceTiedGrads, ReduceGrads, OptimizerStep]
    assert [type(one) for one in todo[-4:]] == ends


def test_micro_batches_that_are_no_groups_have_no_order() -> None:
    with pytest.raises(ValueError, match="5 micro batches are no groups of 2"):
        interleaved_passes(2, 0, 5, 2)


def test_parts_go_to_the_stages_in_turn() -> None:
    from models.config import SIZES as MODELS

    config = MODELS["1b3"]
    chunks = stage_chunks(config, 2, "flops", 2)
    assert chunks == [[(0, 9), (15, 21)], [(9, 15), (21, 28)]]
    assert stage_chunks(config, 2, "flops") == [[(0, 15)], [(15, 28)]]


def test_the_drawings_are_what_happens() -> None:
    lines = [stage.line for stage in play(2, 4, 2)]
    drawn = [
        f"stage {number} {' '.join(line + ['.'] * (max(map(len, lines)) - len(line)))}"
        for number, line in enumerate(lines)
    ]
    assert drawn[1].endswith(" .")
    for text in (schedules.__doc__ or "", (ROOT / "models" / "README.md").read_text()):
        shown = [" ".join(line.split()).removeprefix("interleaved ") for line in text.splitlines()]
        assert set(drawn) <= set(shown)
