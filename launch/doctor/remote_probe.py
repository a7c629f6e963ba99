"""Run the probe and the framework checks on other hosts, over ssh."""

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.doctor.checks import CheckResult
from launch.runtime.ssh import run_on_host


@contextmanager
def shared_token(folder: Path) -> Iterator[Path]:
    """A temporary file in `folder`: hosts that see it share the disk.

    Raises:
        OSError: if the folder cannot be created or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".seen-by-every-host-{uuid.uuid4().hex}"
    token.touch()
    try:
        yield token
    finally:
        token.unlink(missing_ok=True)


def question(
    checkout: Path, token: Path | None = None, port: int | None = None, folder: Path | None = None
) -> str:
    """The probe's argument."""
    return json.dumps(
        {
            "checkout": str(checkout),
            "token": str(token) if token else None,
            "port": port,
            "folder": str(folder) if folder else None,
        }
    )


def facts_of_host(
    host: str,
    python: str,
    checkout: Path,
    token: Path | None = None,
    port: int | None = None,
    folder: Path | None = None,
    timeout: float = 30,
) -> dict[str, Any]:
    """Run the probe on another host. Its source is sent along, so no checkout is needed there.

    Raises:
        UserError: see `run_on_host`.
    """
    probe = Path(__file__).with_name("probe.py").read_text()
    asked = question(checkout, token, port, folder)
    answer = run_on_host(host, [python, "-", asked], stdin=probe, timeout=timeout)
    found: dict[str, Any] = json.loads(answer.strip().splitlines()[-1])
    return found


def framework_of_host(
    host: str, python: str, checkout: Path, timeout: float = 60
) -> list[CheckResult]:
    """Check torch and the cache of compiled ops on another host, with its own checkout.

    Raises:
        UserError: see `run_on_host`.
    """
    command = ["env", "-C", str(checkout), python, "-m", "launch.doctor.torch_check", host]
    answer = run_on_host(host, command, timeout=timeout)
    return [CheckResult(**line) for line in json.loads(answer.strip().splitlines()[-1])]
