"""Few rows in which all values meet that compose: a covering array, found by asking.

Which values compose only the project's own checks know, one row at a time. So a row that they reject
is reduced to the values that it is rejected for, which is a `Refusal`: no later row has them together.
What the refusals leave no row for is impossible; all else must be in a row that the checks accept.

The rows are a greedy choice in the manner of AETG (Cohen et al., IEEE Transactions on Software
Engineering 23(7), 1997): from a combination that is missing yet, a row is filled axis by axis with the
value that brings the most missing combinations. The same ones come out each time.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Row = dict[str, Any]
Combination = tuple[tuple[str, Any], ...]  # axis and value, in the order of the axes
Axes = Mapping[str, Sequence[Any]]
Names = tuple[str, ...]
CANDIDATES = 8  # rows to choose from, each time
# Rows asked about to find out whether some values are refused in all, and the share of changes in them.
VARIATIONS, CHANGED = 100, 0.25


@dataclass(frozen=True)
class Refusal:
    """Values that do not compose whatever the other axes are, and the check's reason."""

    values: Combination
    reason: str
    row: Row  # that was rejected

    def forbids(self, row: Mapping[str, Any]) -> bool:
        """Whether a row, or part of one, has these values."""
        return all(axis in row and row[axis] == value for axis, value in self.values)


def combinations(axes: Axes, together: Iterable[Names]) -> Iterator[Combination]:
    """All values of the axes that are named together."""
    for names in together:
        for values in itertools.product(*(axes[name] for name in names)):
            yield tuple(zip(names, values, strict=True))


def met(row: Row, together: Iterable[Names]) -> Iterator[Combination]:
    """The combinations that are in a row."""
    for names in together:
        yield tuple((name, row[name]) for name in names)


class Space:
    """The rows that compose, as far as `why_not` has been asked.

    Args:
        axes: the values of each; the first ones together are a row that composes.
        why_not: the reason for which a row does not compose, or None.
    """

    def __init__(self, axes: Axes, why_not: Callable[[Row], str | None]) -> None:
        self.axes = axes
        self.usual = {axis: values[0] for axis, values in axes.items()}
        self.refusals: list[Refusal] = []
        self._why_not = why_not
        self._answers: dict[tuple[Any, ...], str | None] = {}
        assert self.ask(self.usual) is None, self.ask(self.usual)

    def ask(self, row: Row) -> str | None:
        """Why a row does not compose, or None; each row is asked about once."""
        key = tuple(row[axis] for axis in self.axes)
        if key not in self._answers:
            self._answers[key] = self._why_not(row)
        return self._answers[key]

    def composes(self, row: Row) -> bool:
        """Whether a row composes; if not, what it is rejected for is refused from now on."""
        reason = self.ask(row)
        kept: set[str] = set()
        while reason is not None and not self.forbids(row):
            found = self._refused_for(row, reason, kept)
            self.refusals += found
            kept |= {axis for refusal in found for axis, _ in refusal.values}
        return reason is None

    def forbids(self, row: Row) -> bool:
        """Whether a row, or part of one, has values that are refused."""
        return any(refusal.forbids(row) for refusal in self.refusals)

    def corrected(self) -> bool:
        """Narrow the refusals that were too wide, with all that is known now; whether some were.

        A refusal is too wide if the rows that would have shown it were rejected for other reasons. One
        that the others imply is left out.
        """
        before = self.refusals
        for refusal in before:
            self.refusals = [other for other in self.refusals if other is not refusal]
            if self.without_refusals(dict(refusal.values)) is not None:
                narrowed = self._with_conditions(dict(refusal.values), refusal.row)
                self.refusals += self._as_refusals(narrowed, refusal.row, refusal.reason)
        return not {r.values for r in self.refusals} <= {r.values for r in before}

    def completed(self, part: Row) -> Row | None:
        """A row with these values that composes; None if there is none."""
        while (row := self.without_refusals(part)) is not None and not self.composes(row):
            pass
        return row

    def without_refusals(self, part: Row) -> Row | None:
        """A row with these values and no refused ones, most others usual: found by backtracking."""
        row = self.usual | part
        broken = next((refusal for refusal in self.refusals if refusal.forbids(row)), None)
        if broken is None:
            return {axis: row[axis] for axis in self.axes}
        # One of the values that this refusal names has to be another; those of `part` stay.
        fixed: Row = {}
        for axis, value in broken.values:
            if axis in part:
                continue
            for other in self.axes[axis]:
                if other != value and (
                    found := self.without_refusals(part | fixed | {axis: other})
                ):
                    return found
            fixed[axis] = value  # and now one of the others
        return None

    def _refused_for(self, row: Row, reason: str, kept: set[str]) -> list[Refusal]:
        """The values for which a row is rejected: few, as what is not needed is made usual first.

        The values on the axes `kept` stay.
        """
        row = dict(row)
        for axis, value in self.usual.items():
            if axis not in kept and row[axis] != value:
                other = self.ask(row | {axis: value})
                if other is not None and _rule(other) == _rule(reason):
                    row[axis] = value
        narrowed = self._with_conditions({axis: row[axis] for axis in kept}, row)
        return self._as_refusals(narrowed, row, reason)

    def _as_refusals(self, several: list[Row], row: Row, reason: str) -> list[Refusal]:
        found = []
        for values in several:
            # The reason where nothing else is wrong, if there is such a row.
            plain = self.without_refusals(values)
            why = self.ask(plain) if plain else None
            ordered = tuple((axis, values[axis]) for axis in self.axes if axis in values)
            found.append(Refusal(ordered, why or reason, row))
        return found

    def _with_conditions(self, values: Row, row: Row) -> list[Row]:
        """`values` of a rejected row if all rows with them are rejected, or else with more of its values.

        If a row with them composes, what it has changed matters, and each change alone may: so each
        is a condition of its own. Values that are refused already are left out.
        """
        if self.forbids(values):
            return []
        for other in self._variations(values, row):
            if self.ask(other) is None:
                for axis in self.axes:
                    if other[axis] != row[axis] and self.ask(other | {axis: row[axis]}) is None:
                        other[axis] = row[axis]
                changed = [axis for axis in self.axes if other[axis] != row[axis]]
                found = [self._with_conditions(values | {axis: row[axis]}, row) for axis in changed]
                return [each for several in found for each in several]
        return [values]

    def _variations(self, values: Row, row: Row) -> Iterator[Row]:
        """Rows with these values and no refused ones: with each single change, then with several."""
        free = [axis for axis in self.axes if axis not in values]
        changes = [{axis: v} for axis in free for v in self.axes[axis] if v != row[axis]]
        draw = random.Random(0)
        for _ in range(VARIATIONS):
            several = [axis for axis in free if draw.random() < CHANGED]
            changes.append({axis: draw.choice(self.axes[axis]) for axis in several})
        for change in changes:
            if (found := self.without_refusals(values | change)) is not None:
                yield found


def _rule(reason: str) -> str:
    """What two rejections by one check have in common: their first lines, but for numbers."""
    return re.sub(r"\d+", "", reason.split(" | ")[0])


@dataclass(frozen=True)
class Covering:
    """Rows that compose, what was refused, and the combinations that are in no row."""

    rows: list[Row]
    refusals: list[Refusal]
    impossible: list[Combination]


def cover(
    axes: Axes,
    together: Sequence[Names],
    why_not: Callable[[Row], str | None],
    cost: Callable[[Row], float] = lambda row: 1.0,
) -> Covering:
    """Rows in which all combinations meet that compose.

    Args:
        axes: the values of each; the first ones together are a row that composes.
        together: the axes of which all combinations of values are to meet, such as each three.
        why_not: the reason for which a row does not compose, or None.
        cost: what a row costs. What is dear is covered first, in as few rows as that takes, and of
            several rows the one is chosen that brings the most for its cost.
    """
    space = Space(axes, why_not)
    covering = _cover(space, together, cost)
    while space.corrected():
        covering = _cover(space, together, cost)
    return replace(covering, refusals=space.refusals)  # without those that others imply


def _cover(space: Space, together: Sequence[Names], cost: Callable[[Row], float]) -> Covering:
    draw = random.Random(0)
    # Of each axis, the names that it is among, and the others of them.
    of_axis = {
        axis: [(names, set(names) - {axis}) for names in together if axis in names]
        for axis in space.axes
    }
    seeds = list(combinations(space.axes, together))
    seeds.sort(key=lambda seed: (-cost(space.usual | dict(seed)), -len(seed)))
    missing = set(seeds)
    impossible: list[Combination] = []
    rows: list[Row] = []
    for seed in seeds:
        if seed not in missing:
            continue
        if space.completed(dict(seed)) is None:
            impossible.append(seed)
            missing.remove(seed)
            continue
        found = [_filled(space, dict(seed), of_axis, missing, draw) for _ in range(CANDIDATES)]
        best = max(found, key=lambda row: sum(c in missing for c in met(row, together)) / cost(row))
        rows.append(best)
        missing.difference_update(met(best, together))
    return Covering(rows, space.refusals, impossible)


def _filled(
    space: Space,
    seed: Row,
    of_axis: Mapping[str, list[tuple[Names, set[str]]]],
    missing: set[Combination],
    draw: random.Random,
) -> Row:
    """A row that composes: the seed, and axis by axis the value that brings most that is missing."""
    order = [axis for axis in space.axes if axis not in seed]
    draw.shuffle(order)
    part = dict(seed)
    for axis in order:
        known = [names for names, others in of_axis[axis] if part.keys() >= others]
        brought = {
            value: sum(c in missing for c in met(part | {axis: value}, known))
            for value in space.axes[axis]
        }
        values = list(space.axes[axis])
        draw.shuffle(values)
        values.sort(key=brought.__getitem__, reverse=True)
        part[axis] = next(v for v in values if space.without_refusals(part | {axis: v}))
    row = {axis: part[axis] for axis in space.axes}
    return row if space.composes(row) else _filled(space, seed, of_axis, missing, draw)
