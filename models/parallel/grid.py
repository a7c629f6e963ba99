"""The grid of ranks: ordered, named axes, and the arithmetic of ranks, coordinates and groups.

Ranks are numbered with the last axis innermost:

    rank = (stage * data + data_rank) * tensor + tensor_rank

A tensor group communicates several times per layer, so its ranks are neighbours on one host.
Pipeline stages communicate once per micro batch, so they are furthest apart (arXiv:2104.04473,
section 3). DeepSpeed's PipeModelDataParallelTopology uses the same order. On 8 ranks with tensor 2,
pipeline 2:

    stage 0:  data 0: ranks 0 1     stage 1:  data 0: ranks 4 5
              data 1: ranks 2 3               data 1: ranks 6 7

    groups("tensor")              0 1 | 2 3 | 4 5 | 6 7   one layer's matrices, sharded
    groups("data")                0 2 | 1 3 | 4 6 | 5 7   the same weights, other samples
    groups("pipeline")            0 4 | 1 5 | 2 6 | 3 7   one sample's path through the layers
    groups("pipeline", "tensor")  0 1 4 5 | 2 3 6 7       one whole model

To add an axis, add an entry to `AXES`. torch's DeviceMesh does the same arithmetic, but needs torch
and an initialised process group. With this file, a laptop can plan 1,024 ranks; `topology.py`
creates the process groups that DeepSpeed needs from it.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# Outermost first. The value says what is divided among the ranks along the axis.
AXES = {"pipeline": "weights", "data": "samples", "tensor": "weights"}
WEIGHT_AXES = tuple(axis for axis, divided in AXES.items() if divided == "weights")
SAMPLE_AXES = tuple(axis for axis, divided in AXES.items() if divided == "samples")


@dataclass(frozen=True, init=False)
class Grid(Mapping[str, int]):
    """The size of every axis of `AXES`, in that order: `Grid(tensor=2, data=4)["tensor"]` is 2.

    An omitted axis has size 1.

    Raises:
        ValueError: for an axis that is not in `AXES`.
    """

    sizes: tuple[int, ...]

    def __init__(self, **sizes: int) -> None:
        for axis in sizes:
            _check(axis)
        # A frozen dataclass can only set fields this way.
        object.__setattr__(self, "sizes", tuple(sizes.get(axis, 1) for axis in AXES))

    def __getitem__(self, axis: str) -> int:
        return self.sizes[list(AXES).index(axis)]

    def __iter__(self) -> Iterator[str]:
        return iter(AXES)

    def __len__(self) -> int:
        return len(AXES)

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return math.prod(self.sizes)

    @property
    def model_size(self) -> int:
        """The number of ranks that hold one whole model together."""
        return math.prod(self[axis] for axis in WEIGHT_AXES)

    def describe(self) -> str:
        """A readable form, for example "pipeline 2 x data 4 x tensor 1"."""
        return " x ".join(f"{axis} {size}" for axis, size in self.items())

    def rank(self, **coordinates: int) -> int:
        """The rank at these coordinates, one along each axis."""
        found = 0
        for axis, size in self.items():
            found = found * size + coordinates[axis]
        return found

    def coordinates(self, rank: int) -> dict[str, int]:
        """A rank's coordinate along each axis."""
        found = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, self[axis])
        return {axis: found[axis] for axis in AXES}

    def groups(self, *axes: str) -> list[list[int]]:
        """All groups of ranks that differ only along these axes, ordered by their first ranks.

        Raises:
            ValueError: for an axis that is not in `AXES`.
        """
        for axis in axes:
            _check(axis)
        found: dict[tuple[int, ...], list[int]] = {}
        for place in itertools.product(*(range(size) for size in self.sizes)):
            coordinates = dict(zip(AXES, place, strict=True))
            fixed = tuple(n for axis, n in coordinates.items() if axis not in axes)
            found.setdefault(fixed, []).append(self.rank(**coordinates))
        return list(found.values())

    def key_value_groups(self, sharing: int) -> list[list[int]]:
        """Each tensor group split into runs of `sharing` ranks that share one key/value head."""
        return [
            ranks[first : first + sharing]
            for ranks in self.groups("tensor")
            for first in range(0, self["tensor"], sharing)
        ]


def _check(axis: str) -> None:
    if axis not in AXES:
        raise ValueError(f"no axis '{axis}'; choose {', '.join(AXES)}")
