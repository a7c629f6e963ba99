"""Select hosts for a job over ssh, and check that they can run it."""

import contextlib
import random
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launch.cluster.job import Job
from launch.doctor.remote_probe import facts_of_host, shared_token
from launch.errors import UserError
from launch.runtime.ssh import read_hostfile

PORTS = (20_000, 32_000)  # below the kernel's ephemeral ports
CLOCK_SECONDS = 60.0  # with a larger offset, file times and logs are misleading


def hosts_of(job: Job) -> dict[str, int]:
    """The first `job.nodes` hosts of the site with their slots, in rank order.

    Raises:
        UserError: if the site names no hosts, too few, or some with too few slots.
    """
    given = job.site.hosts
    if given.hostfile:
        known, where = read_hostfile(Path(given.hostfile).expanduser()), given.hostfile
    else:
        known, where = dict.fromkeys(given.hosts, job.gpus_per_node), "hosts.hosts"
    if not known:
        raise UserError(
            f"--cluster {job.cluster}: name its hosts in the site file (--site), as hosts.hosts or "
            "hosts.hostfile"
        )
    if len(known) < job.nodes:
        raise UserError(
            f"{where}: there are {len(known)} hosts, and --nodes asks for {job.nodes}; lower it, or "
            "add hosts"
        )
    chosen = dict(list(known.items())[: job.nodes])
    for host, slots in chosen.items():
        if slots < job.gpus_per_node:
            raise UserError(
                f"{where}: {host} has {slots} slots, and --gpus-per-node asks for "
                f"{job.gpus_per_node}; lower it, or take another host"
            )
    return chosen


def master_port(job: Job) -> int:
    """The rendezvous port: the site's, or a random one; `check_hosts` checks that it is free."""
    return job.site.port or random.SystemRandom().randrange(*PORTS)


def check_hosts(job: Job, port: int, programs: Mapping[str, str]) -> None:
    """Check that every host can run the job. Creates the run folder, which they must see.

    Args:
        job: the job to run.
        port: the port on which rank 0 would listen.
        programs: the programs that each host needs, with their packages.

    Raises:
        UserError: for the first problem found, naming the host and the fix.
    """
    try:
        with contextlib.ExitStack() as stack:
            try:
                token = stack.enter_context(shared_token(job.run))
            except OSError as error:
                raise UserError(
                    f"runs: cannot write to {job.run} ({error.strerror}); name a folder that this "
                    "machine and every host can write to"
                ) from None
            _ask_and_check(job, port, programs, token)
    except UserError:
        with contextlib.suppress(OSError):  # fails if an earlier run left files in it
            job.run.rmdir()
            job.run.parent.rmdir()
        raise


def _ask_and_check(job: Job, port: int, programs: Mapping[str, str], token: Path) -> None:
    hosts, asked = list(hosts_of(job)), time.time()
    with ThreadPoolExecutor(max_workers=32) as pool:
        found = list(
            pool.map(
                lambda host: facts_of_host(
                    host, job.python, job.checkout, token, port if host == hosts[0] else None
                ),
                hosts,
            )
        )
    for host, facts in zip(hosts, found, strict=True):
        _check(job, host, facts, found[0], asked, port)
        for program, package in programs.items():
            if not facts["programs"][program]:
                raise UserError(
                    f"host {host}: there is no {program}; run there: apt-get install {package}"
                )


def _check(
    job: Job, host: str, facts: dict[str, Any], first: dict[str, Any], asked: float, port: int
) -> None:
    python, expected = facts["python"]["version"], first["python"]["version"]
    if python != expected:
        raise UserError(
            f"host {host}: Python {python} at {job.python}, and {expected} on the first host; every "
            "host needs the same one (python: in the site file)"
        )
    if not facts["checkout"]:
        raise UserError(
            f"host {host}: there is no checkout at {job.checkout}; it has to be at the same path on "
            "every host, best on a shared disk"
        )
    if not facts["token_visible"]:
        raise UserError(
            f"host {host}: does not see {job.run}; runs: in the site file has to name a folder on a disk "
            "that every host shares"
        )
    if facts["commit"] != first["commit"]:
        raise UserError(
            f"host {host}: the checkout is at commit {facts['commit']}, and at {first['commit']} on the "
            "first host; bring them to the same one"
        )
    for package in ("torch", "deepspeed"):
        there, wanted = (
            facts["versions"].get(package, [None, None])[1],
            first["versions"][package][1],
        )
        if there is None or there != wanted:
            raise UserError(
                f"host {host}: {package} is {there or 'not installed'}, and {wanted} on the first host; "
                "run make setup there"
            )
    if facts["port_free"] is False:
        raise UserError(
            f"host {host}: port {port} is in use; name another one (port: in the site file), or none"
        )
    interface = job.site.interface
    if interface and interface not in facts["interfaces"]:
        raise UserError(
            f"host {host}: there is no interface {interface}; choose from: "
            f"{', '.join(sorted(facts['interfaces']))} (interface: in the site file)"
        )
    if abs(facts["clock"] - asked) > CLOCK_SECONDS:
        raise UserError(
            f"host {host}: its clock is {abs(facts['clock'] - asked):.0f} s off; switch time "
            "synchronisation on (timedatectl set-ntp true)"
        )
