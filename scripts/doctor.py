"""Will DeepSpeed run here, or on the hosts of a hostfile? What to mend where it will not.

    python scripts/doctor.py
    python scripts/doctor.py --hostfile hosts.txt --folder /shared/runs

Looks at Python and packages, GPUs, compiler and JIT cache, names, ports and interfaces, disk, shared
memory and clocks, and measures collectives between the ranks. Within a minute or two; exit code 1 where
something FAILs. --line prints one line of this host in a second or two; Slurm jobs do so on each node.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

import argparse
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.doctor import probe
from launch.doctor.checks import Line, check_host, check_together
from launch.doctor.hosts import facts_of_host, question, read_hostfile
from launch.errors import UserError, one_line_errors
from launch.recipe import ROOT

NOT_MEASURED = Line("warn", "network", "not measured", "mend the FAILs first")
COLORS = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
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
    """This host in a line, without importing a framework.

    Raises:
        UserError: where a run cannot start here.
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


def check_cache() -> list[Line]:
    """What lies in the cache of compiled ops, and what a killed build has left there."""
    from launch.jit import built_ops, stale_locks, use_private_cache

    lines = [Line("ok", "JIT cache", f"{use_private_cache()}: {', '.join(built_ops()) or 'empty'}")]
    for lock in stale_locks():
        lines.append(
            Line("FAIL", "JIT cache", f"{lock} is left from a build that was killed; DeepSpeed waits on "
                 "it for ever", f"run: rm {lock}")
        )  # fmt: skip
    return lines


def check_torch() -> list[Line]:
    """Whether torch imports, sees the GPUs, and has its backends."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    text = f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPUs"
    lines = [Line("ok", "torch", text)]
    if probe.gpus() and not cuda:
        lines.append(
            Line("FAIL", "torch", "there are GPUs, and torch sees none", "CPU build, old driver, or "
                 "CUDA_VISIBLE_DEVICES is empty; pip install torch from the CUDA index")
        )  # fmt: skip
    for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())):
        if there:
            version = (
                ".".join(map(str, torch.cuda.nccl.version())) if name == "nccl" and cuda else ""
            )
            lines.append(Line("ok", "torch", f"{name} {version}".strip()))
        elif name == "gloo" or cuda:
            lines.append(Line("FAIL", "torch", f"built without {name}", "install PyPI's torch"))
    for number in range(1, torch.cuda.device_count()):
        if not torch.cuda.can_device_access_peer(0, number):
            lines.append(
                Line("warn", "torch", f"GPU 0 does not reach GPU {number} directly", "no NVLink or P2P: "
                     "tensor parallelism will be slow")
            )  # fmt: skip
    return lines


def check_here(given: argparse.Namespace) -> list[Line]:
    """This machine alone."""
    from launch.doctor.together import measure_here
    from launch.local_ranks import choose_ranks

    given.folder.mkdir(parents=True, exist_ok=True)
    facts = probe.facts(json.loads(question(ROOT, port=given.port, folder=given.folder)))
    lines = [*check_host(facts, several=False, port=given.port), *check_cache(), *check_torch()]
    if any(line.status == "FAIL" for line in lines):
        return [*lines, NOT_MEASURED]
    return [*lines, measure_here(choose_ranks(given.ranks))]


def check_hosts(given: argparse.Namespace) -> list[Line]:
    """Every host of the hostfile, and the network between them."""
    from launch.doctor.together import measure_between

    hosts = read_hostfile(given.hostfile)
    given.folder.mkdir(parents=True, exist_ok=True)
    token = given.folder / f".seen-by-every-host-{uuid.uuid4().hex}"
    token.touch()

    def ask(host: str) -> tuple[dict[str, Any], float] | Line:
        before = time.time()
        try:
            facts = facts_of_host(
                host, sys.executable, ROOT, token, given.port if host == next(iter(hosts)) else None,
                given.folder,
            )  # fmt: skip
        except UserError as error:
            what, _, remedy = str(error).partition("; ")
            return Line("FAIL", host, what.removeprefix(f"host {host}: "), remedy)
        # The host looked at its clock at some time between our two looks.
        after = time.time()
        skew = facts["clock"] - min(max(facts["clock"], before), after)
        return facts, skew

    try:
        with ThreadPoolExecutor(max_workers=32) as pool:
            answers = list(pool.map(ask, hosts))
    finally:
        token.unlink(missing_ok=True)
    lines = [answer for answer in answers if isinstance(answer, Line)]
    found = [answer for answer in answers if not isinstance(answer, Line)]
    for facts, _ in found:
        lines += check_host(facts, several=True, port=given.port)
    if found:
        lines += check_together([facts for facts, _ in found], [skew for _, skew in found])
    if any(line.status == "FAIL" for line in lines):
        return [*lines, NOT_MEASURED]
    variables = {
        name: os.environ[name] for name in os.environ if name.startswith(("NCCL_", "GLOO_"))
    }
    return [*lines, measure_between(hosts, sys.executable, given.port, variables)]


def show(lines: list[Line]) -> None:
    """The findings as a person reads them, the worst last: it is what stays on the screen."""
    table = Table("", "", "", "what to do", box=None, pad_edge=False)
    for line in sorted(lines, key=lambda line: ["ok", "warn", "FAIL"].index(line.status)):
        color = COLORS[line.status]
        table.add_row(
            f"[{color}]{line.status}[/{color}]", escape(line.where), escape(line.what),
            escape(line.remedy),
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and do what it says."""
    given = parse_arguments(arguments)
    given.folder = given.folder.absolute()
    with one_line_errors():
        if given.line:
            print(one_line(given.folder))
            return
        lines = check_hosts(given) if given.hostfile else check_here(given)
        if given.json:
            print(json.dumps([asdict(line) for line in lines], indent=2))
        else:
            show(lines)
        sys.exit(1 if any(line.status == "FAIL" for line in lines) else 0)


if __name__ == "__main__":
    main()
