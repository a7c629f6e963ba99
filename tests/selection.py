"""Which cases of a check `make test` runs: a few in which each kind occurs; `make test-all` runs all.

A test says what each of its cases is of: a ZeRO stage, a precision, a fault. The choice follows from
that by rule, so that a case that is added, or a kind, needs no list to be edited.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import pytest
from _pytest.mark import ParameterSet

MATRIX = "matrix"


def representatives(
    cases: Iterable[Any],
    kinds: Callable[..., Iterable[Hashable]],
    cost: Callable[..., float] = lambda *values: 1.0,
) -> list[ParameterSet]:
    """The cases for `parametrize`; those that no kind needs carry the mark `matrix`.

    A greedy choice: next comes the case that brings the most new kinds for what it costs, and the
    first of equal ones. Then those are left out, the dearest first, whose kinds others have by now.

    Args:
        cases: values, or `pytest.param` of several.
        kinds: gets a case's values and says of which kinds it is.
        cost: gets them too; how long a case takes, for example its number of ranks.
    """
    sets = [case if isinstance(case, ParameterSet) else pytest.param(case) for case in cases]
    of = [set(kinds(*each.values)) for each in sets]
    costs = [cost(*each.values) for each in sets]
    missing = set().union(*of)
    chosen = set()
    while missing:
        best = max(range(len(sets)), key=lambda i: len(of[i] & missing) / costs[i])
        chosen.add(best)
        missing -= of[best]
    for i in sorted(chosen, key=lambda i: -costs[i]):
        if of[i] <= set().union(*(of[other] for other in chosen - {i})):
            chosen.remove(i)
    return [
        each if i in chosen else each._replace(marks=[*each.marks, pytest.mark.matrix])
        for i, each in enumerate(sets)
    ]


def chosen_cases(test: Callable[..., Any]) -> list[tuple[Any, ...]]:
    """The values of those cases of a parametrized test that `make test` runs."""
    (mark,) = [mark for mark in vars(test)["pytestmark"] if mark.name == "parametrize"]
    sets = [case for case in mark.args[1] if isinstance(case, ParameterSet)]
    marked = {i for i, each in enumerate(sets) for mark in each.marks if mark.name == MATRIX}
    return [tuple(each.values) for i, each in enumerate(sets) if i not in marked]
