"""Where a step's time goes: kernels by name, and a small trace written by hand."""

import pytest

from launch.perf.step_profile.kinds import (
    ATTENTION,
    COMMUNICATION,
    COPY,
    ELEMENTWISE,
    GEMM,
    LOSS,
    OPTIMIZER,
    kind_of,
)
from launch.perf.step_profile.record import events_of
from launch.perf.step_profile.split import EXPOSED, IDLE, PARTS, Event, pieces, split

# Names as torch's profiler shows them on an H100, and operators as on a CPU.
NAMES = {
    GEMM: [
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float>", "ampere_bf16_s16816gemm_bf16_128x64",
        "triton_tem_fused_addmm_3", "aten::mm", "aten::addmm", "aten::bmm", "aten::linear",
        "autograd::engine::evaluate_function: AddmmBackward0",
    ],
    ATTENTION: [
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128x128_4x1x1_kernel0_0",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "aten::_scaled_dot_product_flash_attention_for_cpu",
        "void cutlass::device_kernel<flash::FlashAttnFwdSm90>", "aten::_softmax",
    ],
    LOSS: [
        "void at::native::cunn_SoftMaxForward<4, float, float, float, LogSoftMaxForwardEpilogue>",
        "void at::native::nll_loss_forward_reduce_cuda_kernel_2d<float>", "aten::_log_softmax",
        "triton_red_fused__log_softmax__to_copy_nll_loss_forward_7", "liger_cross_entropy_kernel",
        "autograd::engine::evaluate_function: LogSoftmaxBackward0",
    ],
    OPTIMIZER: [
        "void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, FusedAdamMath>",
        "Optimizer.step#AdamW.step", "aten::_fused_adamw_", "multi_tensor_apply_kernel<LpNormFunctor>",
    ],
    COMMUNICATION: [
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_SendRecv", "gloo:all_reduce", "c10d::allgather_", "nccl:_reduce_scatter_base",
    ],
    COPY: ["Memcpy HtoD (Pinned -> Device)", "Memset (Device)", "aten::copy_"],
    ELEMENTWISE: [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
        "void at::native::vectorized_layer_norm_kernel<c10::BFloat16, float>", "aten::add",
        "triton_poi_fused_add_gelu_4", "triton_red_fused_all_reduce_native_layer_norm_2", "aten::gelu",
        "void at::native::reduce_kernel<512, 1, ReduceOp<float, NormTwoOps>>", "aten::native_layer_norm",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"), [(k, name) for k, names in NAMES.items() for name in names]
)
def test_kernels_are_known_by_name(kind: str, name: str) -> None:
    assert kind_of(name) == kind


def test_overlap_is_counted_once_and_the_parts_add_up() -> None:
    """Two steps of 100 us on two streams.

    compute   |gemm 0-30|gap|gelu 40-60 |                    |adam 85-100|
    comm                |all-reduce 50-80                |
    """
    one = [
        Event("sm90_xmma_gemm_bf16", "7", 0, 30),
        Event("triton_poi_fused_gelu", "7", 40, 60),
        Event("ncclDevKernel_AllReduce_Sum", "20", 50, 80),
        Event("FusedAdamMath", "7", 85, 100),
    ]
    two = [each._replace(start=each.start + 100, end=each.end + 100) for each in one]
    found = split([*two, *one], steps=2)
    expected = dict.fromkeys(PARTS, 0.0) | {
        GEMM: 30, ELEMENTWISE: 20, OPTIMIZER: 15, EXPOSED: 20, IDLE: 15
    }  # fmt: skip
    assert {part: 1e6 * each for part, each in found.parts.items()} == pytest.approx(expected)
    assert found.wall == pytest.approx(100e-6) == sum(found.parts.values())
    assert found.overlapped == pytest.approx(10e-6)
    assert found.launches == {GEMM: 1, ELEMENTWISE: 1, OPTIMIZER: 1, COMMUNICATION: 1}
    name, seconds, launches = found.longest[0]
    assert {event.name for event in one} >= {name}
    assert seconds == pytest.approx(30e-6)
    assert launches == 1


def test_two_streams_that_compute_count_once() -> None:
    both = [Event("aten::add", "1", 0, 40), Event("aten::mm", "2", 10, 30)]
    found = split(both, steps=1)
    assert found.parts[GEMM] == pytest.approx(20e-6)
    assert found.parts[ELEMENTWISE] == pytest.approx(20e-6)


def test_what_an_operator_calls_is_not_counted_twice() -> None:
    nested = [
        Event("aten::linear", "1", 0, 100),
        Event("aten::t", "1", 0, 10),  # called by linear
        Event("aten::addmm", "1", 20, 90),
        Event("aten::copy_", "1", 30, 40),
        Event("Optimizer.step#AdamW.step", "1", 120, 150),
        Event("aten::mul", "1", 125, 130),
        Event("aten::gelu", "1", 150, 170),
    ]
    found = split(nested, steps=1)
    assert sum(piece.end - piece.start for piece in pieces(nested)) == 100 + 30 + 20
    assert found.parts[GEMM] == pytest.approx(90e-6), "linear and what it calls, without the copy"
    assert found.parts[COPY] == pytest.approx(10e-6)
    assert found.parts[OPTIMIZER] == pytest.approx(30e-6)
    assert found.parts[ELEMENTWISE] == pytest.approx(20e-6)
    assert found.parts[IDLE] == pytest.approx(20e-6)


def test_a_trace_with_a_gpu_counts_the_gpu_alone() -> None:
    kernel = {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": 5.0, "dur": 2.0}
    copy = kernel | {"cat": "gpu_memcpy", "name": "Memcpy", "args": {"stream": 9}}
    operator = kernel | {"cat": "cpu_op", "name": "aten::mm", "tid": 100}
    launch = kernel | {"cat": "cuda_runtime", "name": "cudaLaunchKernel"}
    step = kernel | {"cat": "user_annotation", "name": "Optimizer.step#AdamW.step", "tid": 100}
    flow = {"ph": "f", "name": "ac2g", "ts": 1.0}
    with_gpu = {
        "traceEvents": [kernel | {"args": {"stream": 7}}, copy, operator, launch, step, flow]
    }
    assert list(events_of(with_gpu)) == [
        Event("gemm", "7", 5.0, 7.0),
        Event("Memcpy", "9", 5.0, 7.0),
    ]
    assert [event.name for event in events_of({"traceEvents": [operator, step]})] == [
        "aten::mm",
        "Optimizer.step#AdamW.step",
    ]


def test_nothing_profiled_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing ran on the device"):
        split([], steps=1)
