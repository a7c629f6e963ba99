"""Faults of sharded models, and workarounds taken out: as in `test_faults.py`. None raises anything."""

import pytest

from tests.parity.faults import SHARDED
from tests.parity.faults.bench import FaultBench, distinct_cases, further_cases, is_found
from tests.parity.faults.seeded import Seeded


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize("seeded", SHARDED, ids=lambda seeded: seeded.id)
def test_fault_is_caught_and_found(seeded: Seeded, fault_bench: FaultBench) -> None:
    seen, places = fault_bench.run(seeded)
    assert seeded.is_seen(seen), seen
    assert is_found(seeded, places) is not bool(seeded.missed), [str(p) for p in places[:3]]


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize("seeded", distinct_cases(SHARDED))
def test_nothing_is_seen_without_a_fault(seeded: Seeded, fault_bench: FaultBench) -> None:
    assert fault_bench.run_sound(seeded) == ([], [])


@pytest.mark.matrix
@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize("seeded", further_cases(SHARDED))
def test_fault_is_caught_in_further_cases(seeded: Seeded, fault_bench: FaultBench) -> None:
    seen, places = fault_bench.run(seeded)
    assert seeded.is_seen(seen), seen
    assert places
