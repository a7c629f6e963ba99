"""Code shared by container clusters: the container's script, names, and cluster commands."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from launch.cluster.job import Job
from launch.errors import UserError

PORT = 29500  # pods and rented hosts are not shared, so it is free
ASK_SECONDS = 120
NAME_LENGTH = 52  # limit of a Job: pod names add a number and five letters, for 63 in total


def name_of(job: Job) -> str:
    """A valid Kubernetes name (letters, digits, dashes), unique among the recipe's runs."""
    plain = re.sub(r"[^a-z0-9-]+", "-", f"{job.name}-{job.run.name}".lower()).strip("-")
    if not plain[0].isalpha():
        plain = f"r-{plain}"
    return (
        plain
        if len(plain) <= NAME_LENGTH
        else f"{plain[:30].rstrip('-')}-{plain[-20:].lstrip('-')}"
    )


def container_script(job: Job, node_rank: str, master: str, config: str, before: str = "") -> str:
    """The container's shell script; `node_rank` and `master` may be variables of the cluster."""
    port = job.site.port or PORT
    return job.render(
        "container.sh.j2",
        node_rank=node_rank,
        master=master,
        config=config,
        before=before,
        port=port,
    )


def literal(text: str) -> str:
    """Escape text for Kubernetes, which expands $(NAME) in commands and variables."""
    return text.replace("$(", "$$(")


def environment(job: Job) -> list[dict[str, str]]:
    """A container's environment variables."""
    return [{"name": name, "value": literal(value)} for name, value in job.environment.items()]


def require(value: str | None, key: str, example: str) -> None:
    """Reject a site that lacks a setting without a sensible default.

    Raises:
        UserError: naming the key.
    """
    if not value:
        raise UserError(
            f"{key}: not given; name one in the site file (--site), for example {example}"
        )


def ask(command: Sequence[str], hint: str) -> str:
    """Run a cluster's command and return its output.

    Raises:
        UserError: if it is missing (with `hint`), hangs or fails.
    """
    if not shutil.which(command[0]):
        raise UserError(f"there is no {command[0]} on this machine; {hint}")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=ASK_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} has not answered within {ASK_SECONDS} s") from None
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise UserError(f"{' '.join(command[:3])}: {words}")
    return done.stdout


def ask_json(command: Sequence[str], hint: str) -> dict[str, Any]:
    """Like `ask`, with the output parsed as JSON."""
    found: dict[str, Any] = json.loads(ask(command, hint))
    return found
