"""Time the steps of a training loop without slowing it down, and profile some more."""

import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.perf.step_profile.record import PROFILED_STEPS, StepProfile

if TYPE_CHECKING:
    import torch


class Watch:
    """Marks the end of each step; the times between the marks are read once, after the last step.

    On a GPU a mark is an event on the current stream, so that the host never waits for the device within
    the loop. On a CPU it is the wall clock.

    Args:
        device: the device on which this rank's steps run.
        steps: how many there are.
        trace: a file for the profile of the last `PROFILED_STEPS`; None: none is made.
    """

    def __init__(self, device: "torch.device", steps: int, trace: Path | None = None) -> None:
        self.device, self.steps = device, steps
        self._profile = None if trace is None else StepProfile(device, trace)
        self._marks = 0
        self._events: list[torch.cuda.Event] = []
        self._clock: list[float] = []

    def mark(self) -> None:
        """Mark the start of the first step, or the end of a step."""
        self._mark()
        if self._profile is not None:
            if self._marks == self.steps - PROFILED_STEPS:
                self._profile.start()
            elif self._marks == self.steps:
                self._profile.stop()
        self._marks += 1

    def profile(self) -> dict[str, Any] | None:
        """Where the time of the profiled steps went (`Split.as_json`); None if it was not recorded."""
        if self._profile is None:
            return None
        try:
            return self._profile.split().as_json()
        except ValueError as error:  # without the driver's leave: the times are good all the same
            print(f"no profile: {error}", file=sys.stderr)
            return None

    def _mark(self) -> None:
        if self.device.type != "cuda":
            self._clock.append(time.perf_counter())
            return
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self._events.append(event)

    def seconds(self) -> list[float]:
        """The seconds of each step. Waits for the device."""
        if self.device.type != "cuda":
            return [end - start for start, end in pairwise(self._clock)]
        self._events[-1].synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairwise(self._events)]
