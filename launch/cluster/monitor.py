"""Monitor a job from outside: its state from the cluster, its progress from metrics.jsonl."""

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

from launch.cluster.backend import backend_of
from launch.cluster.error_log import collect_errors
from launch.cluster.job_store import Record, State
from launch.runtime.failures import LOST_CONNECTION
from launch.runtime.run_dir import read_metrics
from launch.runtime.signals import REASONS

LOOK_EVERY_SECONDS = 1.0
# Queries load the cluster's scheduler; reading the metrics file is cheap.
ASK_EVERY_SECONDS = 5.0
# Errors that result from a failure elsewhere; omitted if the failure itself is reported.
EFFECTS = (LOST_CONNECTION, REASONS[signal.SIGTERM], "the ranks ended with exit code")
OF_A_RANK = re.compile(r"^\[rank \d+\] ")


def progress(record: Record) -> str:
    """The run's progress in a few words."""
    steps = [r for r in read_metrics(Path(record.run) / "metrics.jsonl") if "loss" in r]
    if not steps:
        return f"step 0/{record.steps}"
    last = steps[-1]
    return f"step {last['step']}/{record.steps}, loss {last['loss']:.4f}"


def follow(record: Record, say: Callable[[str], None]) -> State:
    """Report the job's progress until it is over; return its last state."""
    backend = backend_of(record.cluster)
    state, shown, asked = State("unknown"), "", -ASK_EVERY_SECONDS
    while True:
        now = time.monotonic()
        if now - asked >= ASK_EVERY_SECONDS:
            asked, before = now, state
            state = backend.state(record)
            if state != before:
                say(f"{record.id}: {state.kind}{f' ({state.detail})' if state.detail else ''}")
        where = progress(record)
        if where != shown:
            shown = where
            say(where)
        if state.over:
            return state
        time.sleep(LOOK_EVERY_SECONDS)


def errors(record: Record) -> list[str]:
    """Unique `error:` lines of the job's and ranks' logs; only root causes, if there are any."""
    folder = Path(record.folder)
    logs = (*sorted(folder.glob("*.log")), *sorted(folder.glob("logs/*.log")))
    told = collect_errors(logs, submitted=folder / f"{record.recipe}.yaml")
    found = list(dict.fromkeys(OF_A_RANK.sub("", words) for words in told))
    causes = [words for words in found if not words.startswith(EFFECTS)]
    return causes or found
