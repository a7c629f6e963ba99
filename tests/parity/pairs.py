"""Few cases in which each two features meet, instead of all cases."""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]
CANDIDATES = 40  # rows to choose from, each time


def pairs(row: Row) -> list[Pair]:
    """Each two features of a row, with their values."""
    return list(itertools.combinations(row.items(), 2))


def all_rows(
    features: Mapping[str, Sequence[Any]], possible: Callable[[Row], bool]
) -> Iterator[Row]:
    """Each choice of a value for every feature that can be."""
    for values in itertools.product(*features.values()):
        row = dict(zip(features, values, strict=True))
        if possible(row):
            yield row


def pairwise(features: Mapping[str, Sequence[Any]], possible: Callable[[Row], bool]) -> list[Row]:
    """Rows in which each two values meet that can meet; the same ones each time.

    A greedy choice: of some rows with a pair that is missing yet, the one with most such pairs.
    """
    rows = list(all_rows(features, possible))
    missing = dict.fromkeys(pair for row in rows for pair in pairs(row))
    draw = random.Random(0)
    chosen: list[Row] = []
    while missing:
        wanted = dict(next(iter(missing)))
        fitting = [row for row in rows if wanted.items() <= row.items()]
        some = draw.sample(fitting, min(CANDIDATES, len(fitting)))
        chosen.append(max(some, key=lambda row: sum(pair in missing for pair in pairs(row))))
        for pair in pairs(chosen[-1]):
            missing.pop(pair, None)
    return chosen
