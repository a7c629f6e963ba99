"""What the logs of a job say went wrong."""

import re
from collections.abc import Iterable
from pathlib import Path

ERROR = re.compile(r"(?:\d+: )?error: (.*)")  # srun puts the task's number in front


def collect_errors(logs: Iterable[Path], submitted: Path) -> list[str]:
    """What stands behind `error: ` in logs, in their order and without repetition.

    Args:
        logs: the files to read.
        submitted: a file that was written when the job was submitted: older logs are those of an earlier
            job in the same run folder, and left out.
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
