"""Console output of rank 0 during start-up, and timing of the start-up phases."""

import os
import time


def say(text: str) -> None:
    """Print on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


class Stopwatch:
    """Times the phases of the start-up; `started` is a `time.perf_counter()` value."""

    def __init__(self, started: float) -> None:
        self.laps: list[tuple[str, float]] = []
        self.last = started

    def lap(self, name: str) -> None:
        """End the current phase and name it."""
        now = time.perf_counter()
        self.laps.append((name, now - self.last))
        self.last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.laps)
        return f"{sum(seconds for _, seconds in self.laps):.1f} s: {parts}"
