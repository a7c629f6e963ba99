"""Python that DeepSpeed runs in every hook, and that a GPU waits for under ZeRO-2 and ZeRO-3."""

import os

import deepspeed.utils.nvtx as nvtx
import torch
from deepspeed.accelerator import get_accelerator


def mark_no_ranges() -> None:
    """Do not mark ranges for a profiler that does not run.

    Defect: about 40 functions of DeepSpeed push and pop an NVTX range at every call, whether a profiler
        listens or not: some 6,000 pairs in a step of GPT 1.3B under ZeRO-3.
    Versions: DeepSpeed 0.19.8.
    Workaround: switch them off, but not under Nsight Systems, which sets NSYS_PROFILING_SESSION_ID.
    Proof: test_host_overhead.py::test_ranges_are_marked_without_a_profiler
    """
    nvtx.enable_nvtx = "NSYS_PROFILING_SESSION_ID" in os.environ


def ask_for_streams_by_device() -> None:
    """Look the current stream up by the device's number. Does nothing without GPUs.

    Defect: DeepSpeed asks torch for the stream of no device in particular, some 8,000 times in a step of
        GPT 1.3B under ZeRO-3. Each time, torch parses environment variables to find out whether there
        are GPUs.
    Versions: DeepSpeed 0.19.8.
    Workaround: pass the number of the current device.
    Proof: test_host_overhead.py::test_streams_are_asked_for_without_a_device
    """
    accelerator = get_accelerator()
    if accelerator.device_name() != "cuda":
        return

    def current_stream(device_index: int | None = None) -> torch.cuda.Stream:
        device = torch.cuda.current_device() if device_index is None else device_index
        return torch.cuda.current_stream(device)

    accelerator.current_stream = current_stream
