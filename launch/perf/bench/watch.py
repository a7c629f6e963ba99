"""Time the steps of a training loop without slowing it down."""

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Watch:
    """Marks the end of each step; the times between the marks are read once, after the last step.

    On a GPU a mark is an event on the current stream, so that the host never waits for the device within
    the loop. On a CPU it is the wall clock.

    Args:
        device: the device on which this rank's steps run.
    """

    def __init__(self, device: "torch.device") -> None:
        self.device = device
        self._events: list[torch.cuda.Event] = []
        self._clock: list[float] = []

    def mark(self) -> None:
        """Mark the start of the first step, or the end of a step."""
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
            return [end - start for start, end in zip(self._clock, self._clock[1:], strict=False)]
        self._events[-1].synchronize()
        pairs = zip(self._events, self._events[1:], strict=False)
        return [start.elapsed_time(end) / 1000 for start, end in pairs]
