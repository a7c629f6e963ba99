"""The certificate: its compositions equal one device, they cover what composes, and its page is of them.

The compositions are those of `scripts/certify.py`; `make test` runs their core.
"""

import random
import re
from pathlib import Path

import pytest

from launch.certify import array
from launch.certify.axes import AXES, TOGETHER, Row, name, ranks
from launch.certify.compositions import why_not
from launch.certify.covering import combinations, met
from launch.certify.run import run
from launch.certify.table import described
from launch.paths import ROOT

ARRAY = array.load()
CASES = [
    pytest.param(row, id=name(row), marks=[pytest.mark.matrix] if i >= ARRAY.core else [])
    for i, row in enumerate(ARRAY.rows)
]
SHARE = re.compile(r"\d+%")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compositions' text, and tokens of it."""
    made: Path = tmp_path_factory.mktemp("certificate")
    return made


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize("row", CASES)
def test_composition_equals_one_device(row: Row, folder: Path, tmp_path: Path) -> None:
    outcome = run(row, folder, tmp_path, env={})
    assert outcome.status == "holds", outcome.text or outcome


def test_the_core_has_every_value_and_tensor_with_pipeline() -> None:
    core = ARRAY.rows[: ARRAY.core]
    for axis, values in AXES.items():
        assert {row[axis] for row in core} == set(values)
    cuts = {(row["tensor"] > 1, row["pipeline"] > 1) for row in core}
    assert cuts == {(False, False), (True, False), (False, True), (True, True)}
    assert ARRAY.core < len(ARRAY.rows) / 5


def test_it_is_two_hundred_compositions_and_more() -> None:
    names = [name(row) for row in ARRAY.rows]
    assert len(set(names)) == len(names) >= 200


def test_every_composition_passes_the_projects_own_checks(folder: Path) -> None:
    assert {why_not(row, folder) for row in ARRAY.rows} == {None}


def forbidden(part: Row) -> bool:
    return any(all(part.get(a) == v for a, v in values) for values, _ in ARRAY.refused)


def can_be_completed(part: Row, axes: list[str]) -> bool:
    """Whether a row with these values has none of the refused combinations: by trying all."""
    if forbidden(part):
        return False
    left = [axis for axis in axes if axis not in part]
    if not left:
        return True
    return any(can_be_completed(part | {left[0]: value}, axes) for value in AXES[left[0]])


def test_what_is_in_no_composition_has_a_refused_combination_whatever_the_rest_is() -> None:
    """All pairs and triples, and whole layouts in each precision and family, by brute force."""
    covered = {c for row in ARRAY.rows for c in met(row, TOGETHER)}
    named = sorted({axis for values, _ in ARRAY.refused for axis, _ in values}, key=[*AXES].index)
    missed = [c for c in combinations(AXES, TOGETHER) if c not in covered]
    assert [c for c in missed if can_be_completed(dict(c), named)] == []
    assert (("stage", 3), ("pipeline", 2), ("data", 1)) in missed
    assert (("stage", 1), ("pipeline", 2), ("offload", "optimizer")) in covered


@pytest.mark.matrix
def test_what_is_refused_is_refused_in_every_row(folder: Path) -> None:
    """For each refused combination: rows drawn at random that have it, and no other refused one."""
    draw = random.Random(1)
    for values, reason in ARRAY.refused:
        others = [each for each in ARRAY.refused if each[0] != values]
        asked = 0
        for _ in range(4000):
            row = {axis: draw.choice(AXES[axis]) for axis in AXES} | dict(values)
            if not any(all(row[a] == v for a, v in other) for other, _ in others):
                assert why_not(row, folder), f"{values} composes in {name(row)}: {reason}"
                asked += 1
            if asked == 20:
                break
        assert asked


def test_the_page_has_every_composition_and_no_result_that_differs() -> None:
    """Each holds on a CPU; what was not run on GPUs is named so."""
    page = (ROOT / "CERTIFICATE.md").read_text()
    lines = page.split("## Compositions")[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = [each for each in cells if each[0].isdecimal()]
    layouts = [f"{row['data']} x {row['tensor']} x {row['pipeline']}" for row in ARRAY.rows]
    assert [each[:4] for each in table] == [
        [str(ranks(row)), layout, str(row["stage"]), described(row)]
        for row, layout in zip(ARRAY.rows, layouts, strict=True)
    ]
    again = "python scripts/certify.py && python scripts/certify.py --table CERTIFICATE.md"
    assert all(SHARE.fullmatch(each[4]) for each in table), again
