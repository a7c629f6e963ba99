"""Run the probes under each version, some versions at once, and keep each result as it comes."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch.errors import UserError
from launch.versions.compositions import PROBES
from launch.versions.environments import check, install, worker_environment
from launch.versions.results import NOT_RUN, Result, append, from_json, read

WORKER = "launch.versions.worker"


def survey(
    versions: Sequence[str],
    out: Path,
    jobs: int,
    say: Callable[[str], None],
    worker: str = WORKER,
) -> None:
    """Add the results of all probes under these versions to `out`.

    What `out` holds already is not run again, unless it did not run then.
    A version that cannot be installed or imported has all its probes "not run", with the reason.

    Args:
        versions: releases of DeepSpeed.
        out: a file of results.
        jobs: how many versions run at once.
        say: called with one line before and after each version.
        worker: the module to run.
    """
    held = {(r.deepspeed, r.probe) for r in read(out) if r.status != NOT_RUN}
    lock = threading.Lock()

    def keep(result: Result) -> None:
        with lock:
            append(out, result)

    def run(version: str) -> None:
        missing = [p.name for p in PROBES if (version, p.name) not in held]
        if not missing:
            say(f"{version}: all results are in {out}")
            return
        say(f"{version}: {len(missing)} probes")
        try:
            done = _run_worker(version, missing, keep, worker)
            reason = "the worker ended"
        except UserError as error:
            done, reason = set(), str(error)
        for name in missing:
            if name not in done:
                keep(Result(version, name, NOT_RUN, reason))
        say(f"{version}: {len(done)} of {len(missing)} probes gave a result")

    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(run, versions):
            pass


def _run_worker(
    version: str, probes: list[str], keep: Callable[[Result], None], worker: str
) -> set[str]:
    """Run probes under a version; the names of those that gave a result.

    Raises:
        UserError: if the version could not be installed, or its import failed.
    """
    folder = install(version)
    done: set[str] = set()
    errors: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-m", worker, *probes],
        env=worker_environment(folder), cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout and process.stderr
        drain = threading.Thread(target=errors.extend, args=(process.stderr,), daemon=True)
        drain.start()
        try:
            for line in process.stdout:
                values = json.loads(line)
                if "file" in values:
                    check(values, version, folder)
                else:
                    result = from_json(values)
                    keep(result)
                    done.add(result.probe)
        finally:
            process.kill()
        drain.join()
    if not done:
        raise UserError(errors[-1].strip() if errors else "the worker said nothing")
    return done
