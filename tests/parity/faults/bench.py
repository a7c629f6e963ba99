"""Run a case with a fault, recorded: what parity sees first, and the place that bisect names."""

import re
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from launch.certify.compositions import EPS
from launch.certify.run import plan_plain_reference
from launch.config.load import recipe_from_dict
from launch.parity.compare import compare, key_biases, tolerances_of
from launch.parity.places import Place, differences
from launch.parity.run import TrainingRecord, run_layout, run_reference
from tests.parity.cases import EPS_KEY
from tests.parity.faults.seeded import WEIGHTS, Fault, Seeded
from tests.parity.kinds import axes_of
from tests.parity.planting import first_seen
from tests.ranks import run_ranks
from tests.selection import representatives


def recorded_layout(
    fault: Fault,
    values: dict[str, Any],
    scratch: Path,
    uneven: bool,
    record_to: Path,
    steps: int | None,
) -> TrainingRecord:
    """Run in each rank: plant the fault, then be a rank like any other."""
    fault()
    return run_layout(values, scratch, uneven, record_to, steps)


def no_fault() -> None:
    """Plants nothing."""


def is_found(seeded: Seeded, places: list[Place]) -> bool:
    """Whether the first place is that of the fault: step, phase, ranks, and the patterns of its name."""
    if not places:
        return False
    first = places[0]
    return (
        (first.step, first.phase, first.ranks) == (seeded.step, seeded.phase, seeded.ranks)
        and re.fullmatch(seeded.name, first.name) is not None
        and (not seeded.quantity or re.fullmatch(seeded.quantity, first.quantity) is not None)
    )


def distinct_cases(faults: Sequence[Seeded]) -> list[ParameterSet]:
    """One fault of each case; `make test` runs some in which each kind of case occurs."""
    by_case = {f"{s.case} {s.changes}": s for s in faults if not s.refused}
    cases = [pytest.param(seeded, id=seeded.case.name) for seeded in by_case.values()]
    return representatives(cases, _kinds, cost=lambda seeded: seeded.case.ranks)


def _kinds(seeded: Seeded) -> set[Hashable]:
    case = seeded.case
    return {*axes_of(case), type(case), case.family, case.uneven_weights, bool(seeded.changes)}


def further_cases(faults: Sequence[Seeded]) -> list[ParameterSet]:
    """Each fault in each of its further cases."""
    return [
        pytest.param(replace(seeded, case=case, seen=seen), id=f"{seeded.id}-{case.name}")
        for seeded in faults
        for case, seen in seeded.more
    ]


class FaultBench:
    """Runs seeded faults; each reference is computed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._references: dict[str, Any] = {}

    def run(self, seeded: Seeded) -> tuple[list[str], list[Place]]:
        """What parity sees, first of all first; and the places at which the first step differs.

        It runs no further than the step at which the fault has to be seen.
        """
        from launch.parity.layout_recorder import load_recording

        case = seeded.case
        recipe = case.recipe(self.folder, {EPS_KEY: EPS, **(seeded.changes or {})})
        values = recipe.model_dump()
        reference, recorder, ds_config = self._reference(values, case.uneven_weights, seeded.steps)
        with TemporaryDirectory(dir=self.folder) as folder:
            layout = run_ranks(
                recorded_layout, case.ranks, seeded.fault, values,
                self.folder / "swap", case.uneven_weights, Path(folder), seeded.steps,
            )[0]  # fmt: skip
            ranks = {rank: load_recording(Path(folder), rank) for rank in range(case.ranks)}
        limits, free_rows = tolerances_of(recipe, ds_config), key_biases(recipe)
        seen = first_seen(compare(reference, layout, limits, free_rows))
        return seen, differences(recorder.recording, ranks, limits, free_rows)

    def run_sound(self, seeded: Seeded) -> tuple[list[str], list[Place]]:
        """The same without the fault, in all steps."""
        return self.run(replace(seeded, fault=no_fault, seen=WEIGHTS))

    def _reference(self, values: dict[str, Any], uneven: bool, steps: int | None) -> Any:
        from launch.parity.recorder import Recorder

        plan = plan_plain_reference(recipe_from_dict(values), uneven)
        parts = plan.recipe.model_dump(include={"model", "data", "train"})
        key = repr([parts, uneven, plan.ds_config, steps])
        if key not in self._references:
            recorder = Recorder()
            self._references[key] = run_reference(plan, recorder, steps), recorder, plan.ds_config
        return self._references[key]
