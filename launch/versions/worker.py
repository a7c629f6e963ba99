"""One process that has imported one version of DeepSpeed, and forks ranks for each probe.

    PYTHONPATH=<folder of that version>:<checkout> python -m launch.versions.worker zero2-bf16 ...

It writes one JSON object a line to stdout: first which DeepSpeed it is, then a result for each probe.
"""

import importlib
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable

# Before torch and DeepSpeed are imported.
os.environ.update(
    DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"
)

from launch.versions import raw_deepspeed, reference
from launch.versions.compositions import MUON, PROBES
from launch.versions.forked import DidNotRunError, run_forked
from launch.versions.probes import Probe
from launch.versions.results import (
    NOT_RUN,
    NOT_THERE,
    WRONG,
    Record,
    Result,
    Weights,
    compare,
    judge,
    to_json,
)

# What DeepSpeed and torch's optimizers import when they are first used; each fork would do it again.
IMPORTED_LATE = ("torch._dynamo", "torch._inductor", "deepspeed.pipe", MUON["needs"])
RUNS = 3
Layout = Callable[[Probe, int, str], Record]
SECONDS = 120.0  # a probe's limit; it takes one or two


def _reference(
    probe: Probe, muon: frozenset[str], rank: int, folder: str
) -> tuple[Record, Weights]:
    return reference.train(probe, muon), reference.initial_weights(probe)


def train_rank(probe: Probe, rank: int, folder: str) -> Record:
    """What a rank does: train with raw DeepSpeed. `folder` is this run's."""
    return raw_deepspeed.train(probe, rank, f"{folder}/rendezvous")


def measure(probe: Probe, layout: Layout = train_rank, limit: float = SECONDS) -> Result:
    """Run a probe in forks of this process and judge it. `layout` is what each rank calls.

    One that is wrong runs RUNS times in all, to tell a race from a wrong formula.
    """
    import deepspeed
    import torch

    day = time.strftime("%Y-%m-%d")
    run = f"torch {torch.__version__}, Python {platform.python_version()}, {day}"
    result = Result(deepspeed.__version__, probe.name, NOT_THERE, run=run)
    if not _has(probe.needs):
        result.reason = f"this version has no {probe.needs}"
        return result
    begin = time.monotonic()
    try:
        ranks = run_forked(layout, probe.ranks, (probe,), limit)
        ((expected, initial),) = run_forked(_reference, 1, (probe, ranks[0].muon), limit)
        runs = [compare(probe, initial, expected, ranks)]
        while judge(runs[0]) == WRONG and len(runs) < RUNS:
            ranks = run_forked(layout, probe.ranks, (probe,), limit)
            runs.append(compare(probe, initial, expected, ranks))
        result.differences, result.status = runs[0], judge(runs[0])
        wrong = [judge(differences) for differences in runs].count(WRONG)
        if 0 < wrong < RUNS:
            result.reason = f"in {wrong} of {RUNS} runs"
    except DidNotRunError as error:
        result.status, result.reason = NOT_RUN, str(error)
    result.seconds = round(time.monotonic() - begin, 2)
    return result


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it lies in
        return False


def main() -> None:
    """Answer on the stdout that we were given; DeepSpeed prints to stderr instead."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import deepspeed
    import torch

    for module in IMPORTED_LATE:
        if _has(module):
            importlib.import_module(module)
    torch.set_num_threads(1)
    about = {"deepspeed": deepspeed.__version__, "file": deepspeed.__file__}
    print(json.dumps(about), file=answers, flush=True)
    asked = sys.argv[1:]
    for probe in PROBES:
        if probe.name in asked:
            print(json.dumps(to_json(measure(probe))), file=answers, flush=True)


if __name__ == "__main__":
    main()
