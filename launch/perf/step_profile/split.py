"""Split the wall time of profiled steps into kinds of work, exposed communication and gaps.

Each instant belongs to one part, so that the parts add up to the wall time: computing on any stream comes
first; communication is exposed where nothing computes; where nothing runs at all, the device is idle.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from launch.perf.step_profile.kinds import COMMUNICATION, COMPUTE, ELEMENTWISE, kind_of

EXPOSED, IDLE = "exposed communication", "idle"
PARTS = (*COMPUTE, EXPOSED, IDLE)
SHOWN_KERNELS, LONGEST_NAME = 15, 120


class Event(NamedTuple):
    """Something that ran on a stream of a GPU, or on a thread of a CPU, where operators call others.

    Times are in microseconds.
    """

    name: str
    lane: str
    start: float
    end: float


class Piece(NamedTuple):
    """A stretch of time in which one event ran and none that it called."""

    kind: str
    start: float
    end: float


@dataclass(frozen=True)
class Split:
    """The average profiled step of a rank.

    Attributes:
        steps: how many were profiled.
        wall: seconds a step, from the first event's start to the last one's end.
        parts: seconds a step of each of `PARTS`; they add up to `wall`.
        overlapped: seconds a step of communication beside computing.
        launches: events a step, by kind.
        longest: those kernels that took most: name, seconds and launches a step.
    """

    steps: int
    wall: float
    parts: dict[str, float]
    overlapped: float
    launches: dict[str, float]
    longest: list[tuple[str, float, float]]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def split(events: Iterable[Event], steps: int) -> Split:
    """Split the time of `steps` steps.

    Raises:
        ValueError: without events.
    """
    events = list(events)
    found = pieces(events)
    if not found:
        raise ValueError("nothing ran on the device in the profiled steps")
    micro = 1e6 * steps
    # Where pieces of a kind begin and end: at each of those times, who starts or stops.
    changes: dict[float, Counter[str]] = defaultdict(Counter)
    for piece in found:
        changes[piece.start][piece.kind] += 1
        changes[piece.end][piece.kind] -= 1
    times = sorted(changes)
    running: Counter[str] = Counter()
    parts = dict.fromkeys(PARTS, 0.0)
    overlapped = 0.0
    for time, until in pairwise(times):
        running.update(changes[time])
        computing = next((kind for kind in COMPUTE if running[kind]), None)
        communicating = running[COMMUNICATION] > 0
        parts[computing or (EXPOSED if communicating else IDLE)] += (until - time) / micro
        if computing and communicating:
            overlapped += (until - time) / micro
    spent: dict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter(event.name for event in events)
    for event in events:
        spent[event.name] += event.end - event.start
    return Split(
        steps=steps,
        wall=(times[-1] - times[0]) / micro,
        parts=parts,
        overlapped=overlapped,
        launches={
            kind: count / steps for kind, count in Counter(kind_of(e.name) for e in events).items()
        },
        longest=[
            (name[:LONGEST_NAME], time / micro, launches[name] / steps)
            for name, time in sorted(spent.items(), key=lambda item: -item[1])[:SHOWN_KERNELS]
        ],
    )


def pieces(events: Iterable[Event]) -> list[Piece]:
    """The stretches in which each event ran itself, without those that it called.

    What an operator calls has its own kind, or where that is element-wise, the kind of the caller: an
    addition in an optimizer's step is the optimizer's.
    """
    lanes: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        lanes[event.lane].append(event)
    found: list[Piece] = []
    for lane in lanes.values():
        open_events: list[tuple[str, float]] = []  # kind and end, the innermost last
        now = 0.0

        def run_until(time: float, open_events: list[tuple[str, float]], since: float) -> float:
            """Close what ends by `time`; returns up to when the lane is accounted for."""
            while open_events:
                kind, end = open_events[-1]
                stop = min(end, time)
                if stop > since:
                    found.append(Piece(kind, since, stop))
                    since = stop
                if end > time:
                    break
                open_events.pop()
            return max(since, time)

        # An event comes after the one that called it: that began earlier, or ends later.
        for event in sorted(lane, key=lambda event: (event.start, -event.end)):
            now = run_until(event.start, open_events, now)
            kind = kind_of(event.name)
            if kind == ELEMENTWISE and open_events:
                kind = open_events[-1][0]
            open_events.append((kind, event.end))
        run_until(float("inf"), open_events, now)
    return found
