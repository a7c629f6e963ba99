"""Python that DeepSpeed runs in every hook, and that a GPU waits for under ZeRO-2 and ZeRO-3."""

import os
from typing import Any
from weakref import WeakKeyDictionary

import deepspeed.utils.nvtx as nvtx
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partitioned_param_coordinator
from torch import nn

Named = list[tuple[str, nn.Parameter]]


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


def remember_parameters_of_modules() -> None:
    """Walk through a module's parameters once. Call it when all models are built.

    Defect: ZeRO-3 walks through all parameters below a module eight times in a micro batch, in the hooks
        before and after its forward and its backward pass.
    Versions: DeepSpeed 0.19.8.
    Workaround: keep what was found. An engine's modules keep their parameters.
    Proof: test_host_overhead.py::test_parameters_are_walked_through_again
    """
    found: WeakKeyDictionary[nn.Module, dict[bool, Named]] = WeakKeyDictionary()

    def all_parameters(module: nn.Module, recurse: bool = False) -> Named:
        own = found.setdefault(module, {})
        if recurse not in own:
            own[recurse] = list(module.named_parameters(recurse=recurse))
        # Those of other modules that its forward pass uses; DeepSpeed finds them as it runs.
        others: Any = module.ds_external_parameters
        return [*own[recurse], *others()]

    partitioned_param_coordinator.get_all_parameters = all_parameters
