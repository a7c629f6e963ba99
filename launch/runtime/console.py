"""What rank 0 says while a run starts, and where the start-up's seconds go."""

import os
import time


def say(text: str) -> None:
    """Print once, not once per rank."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


class Stopwatch:
    """Names the stretches of the start-up; `started` is a `time.perf_counter()`."""

    def __init__(self, started: float) -> None:
        self.laps: list[tuple[str, float]] = []
        self.last = started

    def lap(self, name: str) -> None:
        """End a stretch, and give it a name."""
        now = time.perf_counter()
        self.laps.append((name, now - self.last))
        self.last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.laps)
        return f"{sum(seconds for _, seconds in self.laps):.1f} s: {parts}"
