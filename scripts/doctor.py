"""Check that DeepSpeed can run here, or on the hosts of a hostfile, and say how to fix problems.

    python scripts/doctor.py
    python scripts/doctor.py --hostfile hosts.txt --folder /shared/runs

Checks Python and packages, GPUs, compiler and JIT cache, host names, ports and interfaces, disk,
shared memory and clocks, and measures collectives between ranks. Takes a minute or two; exit code 1
if a check FAILs. --line prints a one-line summary of this host in a second or two; Slurm jobs run
it on each node.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

from launch.errors import explain_missing_packages

explain_missing_packages()

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.doctor import probe
from launch.doctor.checks import CheckResult, check_host, check_together
from launch.doctor.remote_probe import facts_of_host, framework_of_host, question, shared_token
from launch.doctor.torch_check import check_framework
from launch.errors import UserError
from launch.paths import ROOT
from launch.runtime.failures import one_line_errors
from launch.runtime.ssh import read_hostfile

NOT_MEASURED = CheckResult("warn", "network", "not measured", "fix the FAILs first")
COLORS = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="hosts, as deepspeed takes them"
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs", help="where runs are written; default: runs/"
    )
    parser.add_argument(
        "--port", type=int, default=29500, help="where the ranks are to meet; default: 29500"
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="ranks here; default: one a GPU, or 2"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--line", action="store_true", help="one line about this host, and no more")
    return parser.parse_args(arguments)


def one_line(folder: Path) -> str:
    """One-line summary of this host, without importing a framework.

    Raises:
        UserError: if a run cannot start here.
    """
    host, version = platform.node(), platform.python_version()
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"{host}: cannot write to {folder}; it has to be on a disk that every node shares"
        )
    found = probe.versions(ROOT)
    lacking = [name for name in ("torch", "deepspeed") if found[name][1] is None]
    if lacking:
        raise UserError(f"{host}: {' and '.join(lacking)} not installed; run: make setup")
    gpus = probe.gpus()
    devices = f"{len(gpus)} x {gpus[0]['name']}" if gpus else "no GPU"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / probe.GIB
    return (
        f"{host}: Python {version}, torch {found['torch'][1]}, deepspeed {found['deepspeed'][1]}, "
        f"{devices}, {memory:.0f} GiB memory and {shutil.disk_usage(folder).free / probe.GIB:.0f} GiB "
        f"disk free, clock {time.strftime('%Y-%m-%dT%H:%M:%S%z')}"
    )


def check_here(given: argparse.Namespace) -> list[CheckResult]:
    """Check only this machine."""
    from launch.doctor.collectives_check import measure_here
    from launch.runtime.local_launcher import choose_ranks

    given.folder.mkdir(parents=True, exist_ok=True)
    facts = probe.facts(json.loads(question(ROOT, port=given.port, folder=given.folder)))
    lines = check_host(facts, several=False, port=given.port)
    lines += check_framework(facts["hostname"])
    if any(line.status == "FAIL" for line in lines):
        return [*lines, NOT_MEASURED]
    return [*lines, measure_here(choose_ranks(given.ranks))]


class Answer(NamedTuple):
    """The results of one host in the hostfile; no facts if it could not be probed."""

    lines: list[CheckResult]
    facts: dict[str, Any] | None = None
    skew: float = 0.0  # offset of its clock from ours, in seconds


def _failed(host: str, error: UserError) -> CheckResult:
    what, _, remedy = str(error).partition("; ")
    return CheckResult("FAIL", host, what.removeprefix(f"host {host}: "), remedy)


def check_hostfile(given: argparse.Namespace) -> list[CheckResult]:
    """Check every host of the hostfile, and the network between them."""
    from launch.doctor.collectives_check import measure_between

    hosts = read_hostfile(given.hostfile)

    def ask(host: str, token: Path) -> Answer:
        before = time.time()
        try:
            facts = facts_of_host(
                host, sys.executable, ROOT, token, given.port if host == next(iter(hosts)) else None,
                given.folder,
            )  # fmt: skip
        except UserError as error:
            return Answer([_failed(host, error)])
        # The host read its clock at some time between our two readings.
        after = time.time()
        skew = facts["clock"] - min(max(facts["clock"], before), after)
        lines = check_host(facts, several=True, port=given.port)
        # Checks that import torch depend on the probe's results.
        if not any(line.status == "FAIL" for line in lines):
            try:
                lines += framework_of_host(host, sys.executable, ROOT)
            except UserError as error:
                lines.append(_failed(host, error))
        return Answer(lines, facts, skew)

    with shared_token(given.folder) as token, ThreadPoolExecutor(max_workers=32) as pool:
        answers = list(pool.map(lambda host: ask(host, token), hosts))
    lines = [line for answer in answers for line in answer.lines]
    reached = [(a.facts, a.skew) for a in answers if a.facts is not None]
    if reached:
        lines += check_together([facts for facts, _ in reached], [skew for _, skew in reached])
    if any(line.status == "FAIL" for line in lines):
        return [*lines, NOT_MEASURED]
    variables = {
        name: os.environ[name] for name in os.environ if name.startswith(("NCCL_", "GLOO_"))
    }
    return [*lines, measure_between(hosts, sys.executable, given.port, variables)]


def show(lines: list[CheckResult]) -> None:
    """Print the results with the worst last, so that they stay on the screen."""
    table = Table("", "", "", "what to do", box=None, pad_edge=False)
    for line in sorted(lines, key=lambda line: ["ok", "warn", "FAIL"].index(line.status)):
        color = COLORS[line.status]
        table.add_row(
            f"[{color}]{line.status}[/{color}]", escape(line.where), escape(line.what),
            escape(line.remedy),
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command-line entry point."""
    given = parse_arguments(arguments)
    given.folder = given.folder.absolute()
    with one_line_errors():
        if given.line:
            print(one_line(given.folder))
            return
        lines = check_hostfile(given) if given.hostfile else check_here(given)
        if given.json:
            print(json.dumps([asdict(line) for line in lines], indent=2))
        else:
            show(lines)
        sys.exit(1 if any(line.status == "FAIL" for line in lines) else 0)


if __name__ == "__main__":
    main()
