"""Collect errors from a job's logs."""

import re
from collections.abc import Iterable
from pathlib import Path

ERROR = re.compile(r"(?:\d+: )?error: (.*)")  # srun prepends the task number


def collect_errors(logs: Iterable[Path], submitted: Path) -> list[str]:
    """Collect the messages after `error: ` in logs, in order and without duplicates.

    Args:
        logs: the files to read.
        submitted: a file written when the job was submitted. Older logs belong to an earlier job in
            the same run folder and are skipped.
    """
    since = submitted.stat().st_mtime
    found: dict[str, None] = {}
    for log in logs:
        if log.stat().st_mtime < since:
            continue
        for line in log.read_text(errors="replace").splitlines():
            told = ERROR.match(line)
            if told:
                found[told.group(1)] = None
    return list(found)
