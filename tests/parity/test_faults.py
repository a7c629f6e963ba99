"""Faults that a layout could have, planted one at a time: parity sees each, and bisect finds its place.

Those of a model on data parallel ranks; `test_parallel_faults.py` has those of sharded models.
"""

import pytest

from tests.parity.faults import FAULTS, ONE_MODEL
from tests.parity.faults.bench import FaultBench, distinct_cases, further_cases, is_found
from tests.parity.faults.seeded import Seeded


def test_there_are_at_least_sixty_faults_and_bisect_finds_nine_in_ten() -> None:
    """That each is caught, and found where it says so, is tested one by one."""
    names = [seeded.id for seeded in FAULTS]
    assert len(set(names)) == len(names) >= 60
    missed = {seeded.id: seeded.missed for seeded in FAULTS if seeded.missed}
    assert len(missed) <= len(FAULTS) / 10, missed


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize("seeded", ONE_MODEL, ids=lambda seeded: seeded.id)
def test_fault_is_caught_and_found(seeded: Seeded, fault_bench: FaultBench) -> None:
    seen, places = fault_bench.run(seeded)
    assert seeded.is_seen(seen), seen
    assert is_found(seeded, places) is not bool(seeded.missed), [str(p) for p in places[:3]]


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize("seeded", distinct_cases(ONE_MODEL))
def test_nothing_is_seen_without_a_fault(seeded: Seeded, fault_bench: FaultBench) -> None:
    assert fault_bench.run_sound(seeded) == ([], [])


@pytest.mark.matrix
@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize("seeded", further_cases(ONE_MODEL))
def test_fault_is_caught_in_further_cases(seeded: Seeded, fault_bench: FaultBench) -> None:
    seen, places = fault_bench.run(seeded)
    assert seeded.is_seen(seen), seen
    assert places
