"""Covering arrays over spaces small enough to list: all that composes is covered, and nothing else."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from launch.certify.covering import Covering, Row, cover, met

AXES: dict[str, tuple[Any, ...]] = {
    "a": (0, 1, 2), "b": (0, 1, 2), "c": (False, True), "d": ("x", "y"), "e": (0, 1), "f": (0, 1, 2),
}  # fmt: skip
TRIPLES = list(itertools.combinations(AXES, 3))


def anything(row: Row) -> str | None:
    return None


def one_needs_another(row: Row) -> str | None:
    return "c needs b" if row["c"] and not row["b"] else None


def several_rules(row: Row) -> str | None:
    if row["a"] == 2 and row["b"] == 2:
        return "a and b: 4 are too many"
    if row["d"] == "y" and row["a"] < 1:
        return "d needs a"
    if row["f"] == 2 and row["e"]:
        return "e and f: not together"
    return one_needs_another(row)


def two_changes_at_once(row: Row) -> str | None:
    """One of the two changes alone does not help: both usual values are conditions."""
    return "c: too small" if row["c"] and not (row["a"] and row["b"]) else None


def rules_that_hide_each_other(row: Row) -> str | None:
    """The second rule is seen only where the first is kept."""
    if row["c"] and not row["a"]:
        return "c needs a"
    return "a needs b" if row["a"] and not row["b"] else None


RULES = [
    anything,
    one_needs_another,
    several_rules,
    two_changes_at_once,
    rules_that_hide_each_other,
]


def all_rows(rule: Callable[[Row], str | None]) -> list[Row]:
    rows = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]
    return [row for row in rows if rule(row) is None]


@pytest.mark.parametrize("rule", RULES)
def test_all_triples_that_compose_are_covered(rule: Callable[[Row], str | None]) -> None:
    found = cover(AXES, TRIPLES, rule)
    assert [row for row in found.rows if rule(row) is not None] == []
    assert {c for row in found.rows for c in met(row, TRIPLES)} == {
        c for row in all_rows(rule) for c in met(row, TRIPLES)
    }
    assert len(found.rows) < 45  # 18 at the least: the values of a, b and f


@pytest.mark.parametrize("rule", RULES)
def test_what_is_refused_composes_in_no_row_and_is_the_reason(
    rule: Callable[[Row], str | None],
) -> None:
    found = cover(AXES, TRIPLES, rule)
    for refusal in found.refusals:
        rows = [dict(zip(AXES, v, strict=True)) for v in itertools.product(*AXES.values())]
        of = [row for row in rows if refusal.forbids(row)]
        assert all(rule(row) is not None for row in of), refusal
        assert refusal.reason in {rule(row) for row in of}
        others = [other for other in found.refusals if other is not refusal]
        assert any(not any(other.forbids(row) for other in others) for row in of), "it is implied"
    if rule is several_rules:
        assert {refusal.values for refusal in found.refusals} == {
            (("a", 2), ("b", 2)),
            (("a", 0), ("d", "y")),
            (("e", 1), ("f", 2)),
            (("b", 0), ("c", True)),
        }


def test_the_same_rows_come_out_again() -> None:
    first, second = (cover(AXES, TRIPLES, several_rules) for _ in range(2))
    assert isinstance(first, Covering)
    assert first.rows == second.rows


def test_what_is_dear_is_in_few_rows() -> None:
    found = cover(AXES, TRIPLES, anything, cost=lambda row: 10.0 if row["c"] else 1.0)
    assert sum(row["c"] for row in found.rows) < len(found.rows) / 2
