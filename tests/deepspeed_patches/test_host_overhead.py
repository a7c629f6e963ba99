"""Raw DeepSpeed shows what `launch/deepspeed_patches/speed/host_overhead.py` works around."""

from unittest import mock

from tests.deepspeed_patches.raw import repaired
from tests.ranks import run_ranks


def ranges_of_a_call(repair: bool, profiler: bool) -> int:
    """How many ranges one call of a function with DeepSpeed's decorator pushes."""
    import os

    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import instrument_w_nvtx

    from launch.deepspeed_patches.speed.host_overhead import mark_no_ranges

    if profiler:
        os.environ["NSYS_PROFILING_SESSION_ID"] = "1"
    if repair:
        mark_no_ranges()
    with mock.patch.object(get_accelerator(), "range_push") as push:
        instrument_w_nvtx(len)([])
    return push.call_count


def test_ranges_are_marked_without_a_profiler() -> None:
    raw = run_ranks(ranges_of_a_call, 1, False, False)
    assert raw == [1], repaired("speed/host_overhead.mark_no_ranges")
    assert run_ranks(ranges_of_a_call, 1, True, False) == [0]
    assert run_ranks(ranges_of_a_call, 1, True, True) == [1]


def devices_asked_for(repair: bool) -> list[int | None]:
    """The device that DeepSpeed's accelerator for CUDA names when it asks torch for the current stream."""
    import torch
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    from launch.deepspeed_patches.speed import host_overhead

    accelerator = CUDA_Accelerator()
    set_accelerator(accelerator)
    with (
        mock.patch.object(host_overhead, "get_accelerator", return_value=accelerator),
        mock.patch.object(torch.cuda, "current_device", return_value=3),
        mock.patch.object(torch.cuda, "current_stream") as asked,
    ):
        if repair:
            host_overhead.ask_for_streams_by_device()
        accelerator.current_stream()
    return [call.args[0] for call in asked.call_args_list]


def test_streams_are_asked_for_without_a_device() -> None:
    raw = run_ranks(devices_asked_for, 1, False)
    assert raw == [[None]], repaired("speed/host_overhead.ask_for_streams_by_device")
    assert run_ranks(devices_asked_for, 1, True) == [[3]]


def walks_through_a_module(repair: bool) -> tuple[int, list[int]]:
    """How often ZeRO-3 walks through a module's parameters of two times, and how many it finds.

    Before the second time, it has found out that the module uses a parameter of another one.
    """
    import torch
    from deepspeed.runtime.zero import parameter_offload
    from torch import nn

    from launch.deepspeed_patches.speed.host_overhead import remember_parameters_of_modules

    if repair:
        remember_parameters_of_modules()
        remember_parameters_of_modules()
    module, found = nn.Sequential(nn.Linear(2, 2)), []
    others: dict[str, nn.Parameter] = {}
    with (
        mock.patch.object(
            nn.Module, "ds_external_parameters", lambda _: others.items(), create=True
        ),
        mock.patch.object(module, "named_parameters", wraps=module.named_parameters) as walk,
    ):
        for _ in range(2):
            found.append(len(list(parameter_offload.iter_params(module, True))))
            others["other"] = nn.Parameter(torch.zeros(1))
    return walk.call_count, found


def test_parameters_are_walked_through_again() -> None:
    raw = run_ranks(walks_through_a_module, 1, False)
    assert raw == [(2, [2, 3])], repaired("speed/host_overhead.remember_parameters_of_modules")
    assert run_ranks(walks_through_a_module, 1, True) == [(1, [2, 3])]
