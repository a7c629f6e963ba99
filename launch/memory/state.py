"""Bytes of weights, gradients and optimizer state on a rank, exactly as DeepSpeed 0.19.8 holds them.

ZeRO (arXiv:1910.02054, section 5) partitions the three over the data parallel ranks; what is held
besides depends on the optimizer class that the JSON leads to (`wrapper`), each of which pads, copies
and buffers in its own way. `tests/recipes/test_state_memory.py` compares every number with the
tensors of real engines.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from launch.ds_json.view import (
    accumulation_dtype,
    block,
    dtype_name,
    is_enabled,
    offload_device,
    optimizer_block,
    switched_on,
    zero_block,
    zero_stage,
)
from launch.memory.shapes import Shape, count

Wrapper = Literal["torch", "unfused", "bf16", "zero12", "zero3"]

# Numbers that the optimizer keeps for each weight; Muon has one for its own matrices (`_muons`).
_MOMENTS = {"adam": 2, "adamw": 2, "lamb": 2, "adagrad": 1, "lion": 1, "muon": 2, "sgd": 1}
_FP32 = 4
# DeepSpeed's defaults, in elements.
_BUCKET, _PERSISTENT, _SUB_GROUP = 500_000_000, 100_000, 1_000_000_000


@dataclass
class State:
    """Bytes on one rank. `host` has what is offloaded to host memory or to a disk, by the same names.

    Attributes:
        weights: what the forward pass uses; under ZeRO-3 the rank's partition, and small parameters whole.
        optimizer: moments, and fp32 weights where DeepSpeed keeps its own copy.
        gradients: all gradients when the update starts.
        always: the part of `gradients` that exists between steps too.
        carried: the part that a micro batch leaves for the next.
        reduced: a micro batch's own gradients after their reduction, where they are kept beside `carried`.
        reduced_early: the part of `reduced` that takes its memory with the first gradient.
        buckets: communication buffers that exist all the time.
        backward: communication buffers that exist during the backward pass only.
        waiting: the part of `backward` that a micro batch leaves for the next.
        update: temporary copies during the update.
    """

    weights: int = 0
    optimizer: int = 0
    gradients: int = 0
    always: int = 0
    carried: int = 0
    reduced: int = 0
    reduced_early: int = 0
    buckets: int = 0
    backward: int = 0
    waiting: int = 0
    update: int = 0
    host: dict[str, int] = field(default_factory=dict)


def element_size(ds_config: dict[str, Any]) -> int:
    """Bytes of a weight: 2 in bf16 and fp16, 4 in fp32 and under torch_autocast."""
    return 2 if is_enabled(ds_config, "bf16") or is_enabled(ds_config, "fp16") else 4


def wrapper(ds_config: dict[str, Any]) -> Wrapper:
    """The class that holds the state: torch's optimizer, or one of DeepSpeed's around it.

    bf16: BF16_Optimizer, for ZeRO-1 in bf16 with fp32 accumulation. unfused: FP16_UnfusedOptimizer,
    at stage 0 in bf16 or fp16. zero12, zero3: DeepSpeedZeroOptimizer of stages 1 and 2, and of stage 3.
    """
    stage = zero_stage(ds_config)
    if stage == 0:
        return "torch" if element_size(ds_config) == _FP32 else "unfused"
    wide = dtype_name(accumulation_dtype(ds_config)) == "fp32"
    on_device = offload_device(ds_config, "offload_optimizer") == "none"
    if stage == 1 and is_enabled(ds_config, "bf16") and wide and on_device:
        return "bf16"
    return "zero3" if stage == 3 else "zero12"


def state(
    shapes: Sequence[Shape], ds_config: dict[str, Any], data: int, accumulation: int
) -> State:
    """The state of a rank that holds `shapes`, one of `data` ranks, with `accumulation` micro batches."""
    kind = wrapper(ds_config)
    if kind in ("torch", "unfused"):
        found = _whole(shapes, ds_config)
    elif kind == "bf16":
        found = _bf16(shapes, ds_config, data)
    elif kind == "zero12":
        found = _zero12(shapes, ds_config, data)
    else:
        found = _zero3(shapes, ds_config, data)
    if accumulation == 1:
        found.carried, found.waiting = found.always, 0
    return found


def _master_size(ds_config: dict[str, Any]) -> int:
    """Bytes of a weight that the optimizer updates, which is DeepSpeed's own copy of it in 16 bits."""
    low = block(ds_config, "bf16").get("bf16_master_weights_and_grads")
    return 2 if switched_on(low) else _FP32


def _muons(shapes: Sequence[Shape], ds_config: dict[str, Any]) -> list[int]:
    """Elements of each matrix that Muon takes: those of the blocks."""
    if optimizer_block(ds_config)[0].lower() != "muon":
        return []
    outside = ("token", "position", "output")
    return [shape.numel for shape in shapes if shape.matrix and shape.name not in outside]


def _states_of_optimizer(
    ds_config: dict[str, Any], elements: int, tensors: int, muons: int = 0
) -> int:
    """Moments, and torch's AdamW's count of steps: a number for each tensor that it updates.

    `muons` of the elements are Muon's.
    """
    kind, params = optimizer_block(ds_config)
    counts = tensors * 4 if params.get("torch_adam") else 0
    size = 2 if switched_on(block(ds_config, "bf16").get("bf16_optimizer_states")) else _FP32
    return size * (_MOMENTS.get(kind.lower(), 2) * elements - muons) + counts


def _whole(shapes: Sequence[Shape], ds_config: dict[str, Any]) -> State:
    """Stage 0: nothing is partitioned."""
    size, n = element_size(ds_config), count(shapes)
    master, muons = 0 if size == _FP32 else _FP32 * n, _muons(shapes, ds_config)
    return State(
        weights=size * n,
        optimizer=master + _states_of_optimizer(ds_config, n, len(shapes) - len(muons), sum(muons)),
        gradients=size * n,
        carried=size * n,
        update=0 if size == _FP32 else _FP32 * n,  # gradients in fp32
    )


def _groups(shapes: Sequence[Shape], muons: int = 0) -> list[int]:
    """Elements of the optimizer's two groups: matrices, without Muon's, and vectors."""
    sums = [sum(s.numel for s in shapes if s.matrix is kind) for kind in (True, False)]
    return [n for n in (sums[0] - muons, sums[1]) if n]


def _bf16(shapes: Sequence[Shape], ds_config: dict[str, Any], data: int) -> State:
    """BF16_Optimizer: gradients whole in fp32, and those of one backward pass whole in bf16.

    With `immediate_grad_update`, each of the latter is let go when it has been added to the former.
    """
    muon = _padded(sum(_muons(shapes, ds_config)), 2 * data)
    groups = [_padded(n, 2 * data) for n in _groups(shapes, sum(_muons(shapes, ds_config)))]
    n = sum(groups) + muon
    immediate = switched_on(block(ds_config, "bf16").get("immediate_grad_update"))
    low = 0 if immediate else 2 * count(shapes)
    return State(
        weights=2 * n,
        optimizer=_FP32 * n // data
        + _states_of_optimizer(ds_config, n // data, len(groups), muon // data),
        gradients=_FP32 * n + low,
        always=_FP32 * n,
        carried=_FP32 * n + low,
    )


def _zero12(shapes: Sequence[Shape], ds_config: dict[str, Any], data: int) -> State:
    """DeepSpeedZeroOptimizer: a rank's part of the gradients in fp32, and buckets to reduce them."""
    zero, size = zero_block(ds_config), element_size(ds_config)
    groups = [_padded(n, 2 * data) for n in _groups(shapes)]
    n, part = sum(groups), sum(groups) // data
    largest = max(shape.numel for shape in shapes)
    wide = dtype_name(accumulation_dtype(ds_config)) == "fp32"
    second = zero_stage(ds_config) == 2
    offloaded = offload_device(ds_config, "offload_optimizer") != "none"
    accumulator, master = (_FP32 if wide else size) * part, _master_size(ds_config)
    found = State(
        weights=size * n,
        optimizer=master * part + _states_of_optimizer(ds_config, part, len(groups)),
        gradients=accumulator,
        carried=accumulator,
        # A group's gradients, rounded to what the optimizer updates.
        update=0 if master == _FP32 else master * max(groups) // data,
    )
    bucket = int(zero.get("reduce_bucket_size", _BUCKET))
    copies = 2 if zero.get("overlap_comm", False) else 1
    # Stage 1 puts its accumulated gradients into the bucket, stage 2 those of the backward pass.
    in_bucket = size if second or not wide else _FP32
    found.backward = copies * bucket * in_bucket
    if not second:
        found.gradients += (_FP32 if wide else size) * count(shapes)
        found.carried = found.gradients - accumulator
        found.waiting = found.backward  # no micro batch but the last is reduced, and empties them
    elif not wide and not offloaded:
        # Added to the others when all are there; fp32 sums are added to as gradients come.
        found.reduced = size * part
        found.reduced_early = found.reduced * bool(zero.get("contiguous_gradients", True))
    if offloaded:
        found.host = {
            "optimizer": found.optimizer, "gradients": master * part, "buckets": size * (part + largest)
        }  # fmt: skip
        found.optimizer, found.update, found.buckets = 0, 0, size * largest
    return found


def _zero3(shapes: Sequence[Shape], ds_config: dict[str, Any], data: int) -> State:
    """DeepSpeedZeroOptimizer_Stage3: each parameter split evenly, small ones whole as well."""
    zero, size = zero_block(ds_config), element_size(ds_config)
    parts = {kind: _partition(shapes, kind, data) for kind in (True, False)}
    part = sum(parts.values())
    kept = [s.numel for s in shapes if s.numel <= persistent(zero)]
    small = 0 if data == 1 else size * sum(kept)
    limit = int(zero.get("sub_group_size", _SUB_GROUP))
    groups = sum(max(1, -(-n // limit)) for n in parts.values() if n)
    master, wide = _master_size(ds_config), dtype_name(accumulation_dtype(ds_config)) == "fp32"
    copy, summed = 0 if size == _FP32 else master * part, _FP32 if wide else size
    bucket = size * int(zero.get("reduce_bucket_size", _BUCKET))
    found = State(
        weights=size * part + small,
        optimizer=copy + _states_of_optimizer(ds_config, part, groups),
        gradients=summed * part,
        always=summed * part,
        carried=summed * part,
        buckets=bucket * zero.get("contiguous_gradients", True),
        # A sub-group's gradients, flattened, and in the dtype of what the optimizer updates.
        update=(summed + master * (summed != master)) * min(limit, max(parts.values())),
    )
    if offload_device(ds_config, "offload_optimizer") != "none":
        # The accumulator, and the gradient of what the optimizer updates.
        found.host = {"optimizer": found.optimizer, "gradients": (summed + master) * part}
        found.optimizer = found.gradients = found.always = found.carried = found.update = 0
    if offload_device(ds_config, "offload_param") != "none":
        found.host["weights"] = size * part
        found.weights = small
    return found


def persistent(zero: dict[str, Any]) -> int:
    """ZeRO-3 keeps parameters of at most this many elements whole on every rank."""
    return int(zero.get("stage3_param_persistence_threshold", _PERSISTENT))


def _partition(shapes: Sequence[Shape], matrix: bool, data: int) -> int:
    return sum(-(-shape.numel // data) for shape in shapes if shape.matrix is matrix)


def _padded(elements: int, multiple: int) -> int:
    return -(-elements // multiple) * multiple
