"""launch/README.md says of each recipe and each cluster what is so."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from launch.cluster.backend import MODULES
from launch.config.load import load_recipe
from launch.paths import ROOT

TEXT = (ROOT / "launch/README.md").read_text()
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def table(first_column: str) -> list[list[str]]:
    """The rows of the table whose first column has this head."""
    _, _, rest = TEXT.partition(f"| {first_column} |")
    rows = []
    for line in rest.splitlines()[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_each_recipe_has_its_number_of_ranks(file: Path) -> None:
    rows = [
        row
        for row in table("recipe")
        if any(fnmatch(file.stem, name) for name in re.findall(r"`([^`]+)`", row[0]))
    ]
    assert len(rows) == 1, f"launch/README.md: {file.stem} is in {len(rows)} rows"
    parallel = load_recipe(f"recipes/{file.stem}.yaml").parallel
    stated = rows[0][1]
    if not stated.startswith("tensor x pipeline"):
        assert int(stated) == parallel.tensor * parallel.pipeline


def test_each_cluster_has_its_row_and_page() -> None:
    rows = table("`--cluster`")
    assert [row[0].strip("`") for row in rows] == list(MODULES)
    for row in rows:
        not_run = "schema-checked, not run" in row[3]
        assert not_run == (row[0].strip("`") in ("k8s", "kubeflow", "skypilot"))
