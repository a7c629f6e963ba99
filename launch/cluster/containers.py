"""What the clusters that run containers share: the image's script, names, and commands in words."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from launch.cluster.job import Job
from launch.errors import UserError

PORT = 29500  # of the pod or rented host, which nobody shares
ASK_SECONDS = 120
NAME_LENGTH = 52  # of a Job: its pods' names get a number and five letters more, 63 in all


def name_of(job: Job) -> str:
    """A name that Kubernetes takes and that no other run of the recipe has: letters, digits, dashes."""
    plain = re.sub(r"[^a-z0-9-]+", "-", f"{job.name}-{job.run.name}".lower()).strip("-")
    if not plain[0].isalpha():
        plain = f"r-{plain}"
    return (
        plain
        if len(plain) <= NAME_LENGTH
        else f"{plain[:30].rstrip('-')}-{plain[-20:].lstrip('-')}"
    )


def container_script(job: Job, node_rank: str, master: str, config: str, before: str = "") -> str:
    """The shell script of a container; `node_rank` and `master` may be the cluster's variables."""
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
    """Text as Kubernetes leaves it alone: it replaces $(NAME) in commands and variables."""
    return text.replace("$(", "$$(")


def environment(job: Job) -> list[dict[str, str]]:
    """The variables of a container."""
    return [{"name": name, "value": literal(value)} for name, value in job.environment.items()]


def require(value: str | None, key: str, example: str) -> None:
    """Reject a site that leaves open what nobody can guess.

    Raises:
        UserError: naming the key.
    """
    if not value:
        raise UserError(
            f"{key}: not given; name one in the site file (--site), for example {example}"
        )


def ask(command: Sequence[str], hint: str) -> str:
    """What a cluster's command prints.

    Raises:
        UserError: where it is missing (with `hint`), hangs or fails.
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
    """The same, read as JSON."""
    found: dict[str, Any] = json.loads(ask(command, hint))
    return found
