"""Where what a rank holds lies in the whole parameter.

A rank holds a run of consecutive elements (ZeRO's partition) of a shard (tensor parallelism's) of a
parameter. In the whole parameter that is a few boxes, and a box is what a checkpoint stores: it has an
offset and a size along each dimension, and knows nothing of the layout that saved it.

    shard [2, 4], elements 1 to 7      boxes: [0, 1:4] and [1, 0:3]
        . x x x
        x x x .
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A part of a tensor: `sizes[d]` elements from `offsets[d]` on, along each dimension d."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of its elements."""
        count = 1
        for size in self.sizes:
            count *= size
        return count

    def intersection(self, other: "Box") -> "Box | None":
        """What lies in both; None if nothing does."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        ends = [
            min(a + n, b + m)
            for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        ]
        sizes = tuple(end - offset for end, offset in zip(ends, offsets, strict=True))
        return Box(offsets, sizes) if all(size > 0 for size in sizes) else None

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """This box as an index into a tensor that holds `outer`."""
        return tuple(
            slice(a - b, a - b + n)
            for a, n, b in zip(self.offsets, self.sizes, outer.offsets, strict=True)
        )


@dataclass(frozen=True)
class Span:
    """`length` consecutive rows (or columns) that lie at `local` in a shard and at `whole` in the whole."""

    local: int
    whole: int
    length: int


@dataclass(frozen=True)
class Cut:
    """How a rank's shard lies in a whole parameter of `shape`: spans along `dim`, all of the others.

    What a shard has beside its spans is padding.
    """

    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    dim: int
    spans: tuple[Span, ...]

    @classmethod
    def uncut(cls, shape: Sequence[int]) -> "Cut":
        """A parameter that each tensor rank holds whole."""
        whole = tuple(shape)
        return cls(whole, whole, 0, (Span(0, 0, whole[0] if whole else 1),))

    def boxes(self, flat: Tensor, start: int) -> Iterator[tuple[Box, Tensor]]:
        """Split a run of the shard's elements into boxes of the whole parameter.

        Args:
            flat: the elements, `[n]`.
            start: the place of the first one in the flattened shard.

        Yields:
            Each box with a view of `flat` of the box's sizes.
        """
        for local in _boxes_of_run(self.local_shape, start, start + flat.numel()):
            first = _place(self.local_shape, local.offsets) - start
            part = flat[first : first + local.numel].view(local.sizes)
            if not self.shape:
                yield local, part
                continue
            for span in self.spans:
                d = self.dim
                low = max(span.local, local.offsets[d])
                high = min(span.local + span.length, local.offsets[d] + local.sizes[d])
                if low >= high:
                    continue
                offsets, sizes = list(local.offsets), list(local.sizes)
                offsets[d], sizes[d] = low - span.local + span.whole, high - low
                yield (
                    Box(tuple(offsets), tuple(sizes)),
                    part.narrow(d, low - local.offsets[d], high - low),
                )


def _place(shape: Sequence[int], offsets: Sequence[int]) -> int:
    place = 0
    for size, offset in zip(shape, offsets, strict=True):
        place = place * size + offset
    return place


def _boxes_of_run(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The boxes that elements `start` to `stop` of a flattened tensor are made of, in order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box((start,) * len(shape), (stop - start,) * len(shape))
        return
    row = 1
    for size in shape[1:]:
        row *= size
    first, last = -(-start // row), stop // row  # the whole rows between
    if first > last:  # within one row
        yield from _in_row(shape, start // row, start % row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start % row, row)
    if first < last:
        rest = shape[1:]
        yield Box((first, *(0 for _ in rest)), (last - first, *rest))
    if last * row < stop:
        yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    for box in _boxes_of_run(shape[1:], start, stop):
        yield Box((row, *box.offsets), (1, *box.sizes))
