r"""Submit a recipe to a cluster through its own scheduler, and monitor or cancel the job.

    python scripts/submit.py --recipe recipes/gpt_1b3_zero1.yaml --cluster slurm --nodes 2 \
        --gpus-per-node 8 --site site.yaml --follow
    python scripts/submit.py status
    python scripts/submit.py cancel 4711 --save

The job is rendered to readable, editable files, checked and submitted; --dry-run prints the files
instead. launch/README.md has a page for each cluster.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

from launch.errors import explain_missing_packages

explain_missing_packages()

import argparse
import logging
import os
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from launch.cluster.backend import MODULES, SHARED_DISK, backend_of
from launch.cluster.job import Job, check_config, make_job, notes, write_files
from launch.cluster.job_store import Record, find, records, remember
from launch.cluster.monitor import errors, follow, progress
from launch.cluster.site import load_site
from launch.errors import UserError
from launch.paths import ROOT
from launch.runtime.failures import one_line_errors


def say(text: str) -> None:
    """Print without buffering, for live output."""
    print(text, flush=True)


def parse_submission(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of a submission."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", required=True, metavar="RECIPE", help="recipes/*.yaml")
    parser.add_argument("--cluster", required=True, choices=tuple(MODULES))
    parser.add_argument("--nodes", required=True, type=int, metavar="N", help="number of hosts")
    parser.add_argument(
        "--gpus-per-node", required=True, type=int, metavar="G", help="ranks on each host"
    )
    parser.add_argument(
        "--site", type=Path, metavar="FILE", help="what is particular to your cluster, in YAML"
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[],
        help="change keys of the recipe; with run.dir=FOLDER the job goes on with that run",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="print the files of the job, and stop"
    )
    parser.add_argument(
        "--follow", action="store_true", help="show the job's progress until it is over"
    )
    return parser.parse_args(arguments)


def parse_care(verb: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of `status` and `cancel`."""
    parser = argparse.ArgumentParser(prog=f"submit.py {verb}")
    if verb == "status":
        parser.add_argument("job", nargs="?", help="an id or a run folder; default: all")
        parser.add_argument("--follow", action="store_true", help="show progress until it is over")
    else:
        parser.add_argument("job", help="an id or a run folder")
        parser.add_argument(
            "--save", action="store_true", help="let the run save and end after the step at hand"
        )
    return parser.parse_args(arguments)


def submit(given: argparse.Namespace) -> int:
    """Render, check and submit; return the exit code.

    Raises:
        UserError: for user errors, before the job is submitted.
    """
    # DeepSpeed is loaded for its config keys and would warn about missing GPUs, not needed here.
    logging.disable(logging.WARNING)
    site = load_site(given.site.absolute() if given.site else None)
    if Path(given.recipe).is_file():
        given.recipe = str(Path(given.recipe).absolute())
    os.chdir(ROOT)  # as on the hosts: paths in a recipe are relative to the checkout
    job = make_job(
        given.cluster, given.recipe, given.set, given.nodes, given.gpus_per_node, site,
        given.cluster in SHARED_DISK,
    )  # fmt: skip
    backend = backend_of(given.cluster)
    files = backend.files(job)
    # The slowest check comes last: a host that is off is told at once.
    if given.dry_run:
        check_config(job)
        for name, text in {**files, job.config.name: job.recipe_yaml}.items():
            say(f"##### {job.folder / name}\n{text}")
    else:
        refuse_a_second_job(job)
        backend.check(job)
        check_config(job)
        write_files(job, files)
        identifier, details = backend.submit(job)
        record = remember(job, identifier, details)
    say(f"{job.nodes} nodes of {job.gpus_per_node}: {job.layout.describe()}")
    for note in notes(job):
        say(note)
    if given.dry_run:
        return 0
    say(f"job: {record.id}")
    say(f"logs: {job.logs}")
    say(f"run folder: {job.run}")
    return watch(record) if given.follow else 0


def refuse_a_second_job(job: Job) -> None:
    """Reject a second job in a run folder: they would overwrite each other's checkpoints.

    Raises:
        UserError: if an earlier job of the run is not over.
    """
    if (job.folder / "job.json").exists():
        earlier = find(str(job.folder))
        state = backend_of(earlier.cluster).state(earlier)
        if not state.over:
            raise UserError(
                f"run.dir: job {earlier.id} has {job.run} and is {state.kind}; wait for its end, or "
                f"end it: scripts/submit.py cancel {earlier.id} (if it is surely gone: rm "
                f"{job.folder}/job.json)"
            )


def watch(record: Record) -> int:
    """Follow a job to its end; return 0 if its run finished. Ctrl-C only stops following.

    Raises:
        UserError: if the run did not finish, with the ranks' errors and the path of the logs.
    """
    try:
        state = follow(record, say)
    except KeyboardInterrupt:
        say(
            f"job {record.id} goes on; see it: scripts/submit.py status --follow {record.id}, end it: "
            f"scripts/submit.py cancel {record.id}"
        )
        return 130
    if state.kind == "completed":
        return 0
    how = f"{state.kind} ({state.detail})" if state.detail else state.kind
    reasons = " | ".join(errors(record)[:3]) or "no rank has said why"
    raise UserError(f"job {record.id} {how}: {reasons}; logs: {record.folder}/logs")


def status(given: argparse.Namespace) -> int:
    """Show the state of jobs."""
    if given.job and given.follow:
        return watch(find(given.job))
    table = Table("job", "cluster", "recipe", "state", "progress", "run folder", box=None)
    for record in [find(given.job)] if given.job else records():
        try:
            state = backend_of(record.cluster).state(record)
            text = f"{state.kind}{f' ({state.detail})' if state.detail else ''}"
        except UserError as error:
            text = f"unknown ({error})"
        table.add_row(record.id, record.cluster, record.recipe, text, progress(record), record.run)
    Console(width=None if sys.stdout.isatty() else 240).print(table)
    return 0


def cancel(given: argparse.Namespace) -> int:
    """Cancel a job, immediately or after a save."""
    record = find(given.job)
    if given.save:
        stop = Path(record.run) / "STOP"
        if not stop.parent.is_dir():
            raise UserError(
                f"--save: there is no {stop.parent} on this machine; touch {stop} on a host that has it"
            )
        stop.touch()
        say(
            f"job {record.id} saves and ends after the step at hand; go on with --set run.dir={record.run}"
        )
        return 0
    backend_of(record.cluster).cancel(record)
    say(f"job {record.id}: cancelled")
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Command-line entry point."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    verbs = {"status": status, "cancel": cancel}
    if words and words[0] in verbs:
        given = parse_care(words[0], words[1:])
        action = verbs[words[0]]
    else:
        given, action = parse_submission(words), submit
    with one_line_errors():
        sys.exit(action(given))


if __name__ == "__main__":
    main()
