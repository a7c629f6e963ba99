"""Probes run against the installed DeepSpeed say what the committed results say, and see planted faults."""

import os
import time
from typing import Any

import pytest

from launch.paths import ROOT
from launch.versions.compositions import PROBES
from launch.versions.probes import Probe
from launch.versions.results import NOT_RUN, NOT_THERE, OK, WRONG, Record, Result, read
from tests.ranks import run_ranks
from tests.selection import representatives

BY_NAME = {probe.name: probe for probe in PROBES}
ZERO2 = BY_NAME["ZeRO-2, accumulation: plain"]


def measure(probe: Probe, layout: Any = None, limit: float = 300.0) -> Result:
    """In a fork of the fork server: like a worker, it has imported DeepSpeed and computed nothing."""
    from launch.versions import worker

    return worker.measure(probe, layout or worker.train_rank, limit)


def kinds(probe: Probe) -> list[Any]:
    return [probe.loop, "wrong" if probe.feature == "stage 0, fp16" else ""]


@pytest.mark.parametrize(
    "probe",
    representatives(PROBES, kinds, lambda probe: 1.0 + probe.stage),
    ids=lambda probe: probe.name,
)
def test_the_installed_version_is_as_the_page_says(probe: Probe) -> None:
    (found,) = run_ranks(measure, 1, probe)
    known = {
        result.probe: result.status
        for result in read(ROOT / "DEEPSPEED_VERSIONS.jsonl")
        if result.deepspeed == found.deepspeed
    }
    assert found.status == known[probe.name], (found.reason, found.differences)


def with_gradients_of_one_rank(probe: Probe, rank: int, folder: str) -> Record:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    from launch.versions import worker

    DeepSpeedZeroOptimizer.average_tensor = lambda *given, **named: None
    return worker.train_rank(probe, rank, folder)


def that_raises(probe: Probe, rank: int, folder: str) -> Record:
    raise RuntimeError("no such\nfeature")


def that_dies(probe: Probe, rank: int, folder: str) -> Record:
    if rank == 1:
        os._exit(11)
    time.sleep(1000.0)
    raise AssertionError


def that_hangs(probe: Probe, rank: int, folder: str) -> Record:
    time.sleep(1000.0)
    raise AssertionError


def test_a_planted_fault_is_wrong() -> None:
    (found,) = run_ranks(measure, 1, ZERO2, with_gradients_of_one_rank)
    assert found.status == WRONG
    assert {each.quantity for each in found.differences} >= {"gradient norm", "update"}


@pytest.mark.parametrize(
    ("layout", "limit", "reason"),
    [
        (that_raises, 300.0, "RuntimeError: no such feature"),
        (that_dies, 300.0, "rank 1 died"),
        (that_hangs, 10.0, "rank 0 did not end within 10 s"),
    ],
)
def test_what_fails_did_not_run(layout: Any, limit: float, reason: str) -> None:
    (found,) = run_ranks(measure, 1, ZERO2, layout, limit)
    assert (found.status, found.reason) == (NOT_RUN, reason)


def test_a_feature_that_a_version_lacks_is_not_there() -> None:
    probe = Probe("new", needs="deepspeed.runtime.of_next_year")
    (found,) = run_ranks(measure, 1, probe)
    assert found.status == NOT_THERE
    assert found.status != OK
