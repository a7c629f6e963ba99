"""Record what runs on a rank's device for some steps, with torch's profiler."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.perf.step_profile.split import Event, Split, split

if TYPE_CHECKING:
    import torch

PROFILED_STEPS = 3
# In a trace of torch's profiler: what runs on a GPU, and on a CPU operators and the optimizer's step.
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_ON_CPU = ("cpu_op",)
_OPTIMIZER = "Optimizer.step"


class StepProfile:
    """Profiles steps; on a GPU its kernels alone, so that the host is slowed little.

    Args:
        device: where this rank's steps run.
        file: the trace, .json.gz, which https://ui.perfetto.dev shows.
    """

    def __init__(self, device: "torch.device", file: Path) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.device, self.file = device, file
        gpu = device.type == "cuda"
        self._profile = profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU])

    def start(self) -> None:
        """Begin, once the device has done what it was given."""
        self._wait()
        self._profile.start()

    def stop(self) -> None:
        """End, once the device has done what it was given."""
        self._wait()
        self._profile.stop()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)

    def split(self, steps: int = PROFILED_STEPS) -> Split:
        """Write the trace, and split the steps' time."""
        self._profile.export_chrome_trace(str(self.file))
        with gzip.open(self.file, "rt") as text:
            return split(events_of(json.load(text)), steps)


def events_of(trace: dict[str, Any]) -> Iterator[Event]:
    """What ran on the device, in a trace in Chrome's format: the GPU, or where there is none, the CPU."""
    spans = [each for each in trace["traceEvents"] if each.get("ph") == "X"]
    gpu = [each for each in spans if each.get("cat") in _ON_GPU]
    for each in gpu or [each for each in spans if _is_on_cpu(each)]:
        lane = each["args"].get("stream", each["tid"]) if gpu else each["tid"]
        yield Event(each["name"], str(lane), each["ts"], each["ts"] + each["dur"])


def _is_on_cpu(span: dict[str, Any]) -> bool:
    return span.get("cat") in _ON_CPU or str(span.get("name")).startswith(_OPTIMIZER)
