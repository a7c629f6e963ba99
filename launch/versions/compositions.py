"""The probes: the core of DeepSpeed's features, each alone and in combinations.

A group is a row of the table. It names no version: which versions are wrong is measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from launch.versions.probes import Probe, Shape

Changes = dict[str, Any]

MICRO: Changes = {"accumulation": 3}
CLIP: Changes = {"clip": 0.5}
ADAMW: Changes = {"optimizer": "adamw"}
OFFLOAD: Changes = {"zero": {"offload_optimizer": {"device": "cpu"}}}
SEVERAL: Changes = {"loop": "boundary"} | MICRO
FP32_GRADIENTS: Changes = {"json": {"data_types": {"grad_accum_dtype": "fp32"}}}
AUXILIARY: Changes = {"shape": Shape(auxiliary=True)}
REENTRANT: Changes = {"shape": Shape(recompute="reentrant")}
UNUSED: Changes = {"shape": Shape(unused=True)}
TIED: Changes = {"shape": Shape(tied=True)}
PIPELINE: Changes = {"loop": "pipeline", "stages": 2}
AUTOCAST: Changes = {"dtype": "autocast", "needs": "deepspeed.runtime.torch_autocast"}
MUON: Changes = {"optimizer": "muon", "needs": "deepspeed.runtime.zero.muon.muon_optimizer"}
WHOLE: Changes = {"zero": {"reduce_scatter": False}}  # Muon needs whole matrices


def _zero(stage: int, dtype: str = "fp32") -> Changes:
    return {"stage": stage, "dtype": dtype}


# Name of the group, and what each of its probes changes.
GROUPS: tuple[tuple[str, dict[str, Changes]], ...] = (
    (
        "stage 0, fp32",
        {"plain": {}, "accumulation, clip": MICRO | CLIP, "unused layer": UNUSED},
    ),
    (
        "stage 0, bf16",
        {"plain": _zero(0, "bf16"), "accumulation, clip": _zero(0, "bf16") | MICRO | CLIP},
    ),
    (
        "stage 0, fp16",
        {"plain": _zero(0, "fp16"), "clip": _zero(0, "fp16") | CLIP},
    ),
    (
        "ZeRO-1",
        {
            "clip": _zero(1) | CLIP,
            "bf16, accumulation": _zero(1, "bf16") | MICRO,
            "fp16, overflow": _zero(1, "fp16") | {"overflow": 2},
            "AdamW, 4 ranks": _zero(1) | ADAMW | {"ranks": 4},
        },
    ),
    (
        "ZeRO-1, bf16, fp32 gradients",
        {
            "plain": _zero(1, "bf16") | FP32_GRADIENTS,
            "accumulation": _zero(1, "bf16") | FP32_GRADIENTS | MICRO,
            "clip": _zero(1, "bf16") | FP32_GRADIENTS | CLIP,
        },
    ),
    (
        "ZeRO-2",
        {
            "clip": _zero(2) | CLIP,
            "bf16": _zero(2, "bf16"),
            "fp16": _zero(2, "fp16"),
            "unused layer": _zero(2) | UNUSED,
            "a block used twice": _zero(2, "bf16") | {"shape": Shape(used_twice=True)},
            "round robin, 4 ranks": _zero(2)
            | {"zero": {"round_robin_gradients": True}, "ranks": 4},
        },
    ),
    (
        "ZeRO-2, accumulation",
        {
            "plain": _zero(2) | MICRO,
            "bf16, clip": _zero(2, "bf16") | MICRO | CLIP,
            "AdamW": _zero(2) | MICRO | ADAMW,
            "tied": _zero(2) | MICRO | TIED,
        },
    ),
    (
        "ZeRO-3",
        {
            "clip": _zero(3) | CLIP,
            "bf16, accumulation": _zero(3, "bf16") | MICRO,
            "tied, accumulation": _zero(3) | MICRO | TIED,
            "unused layer": _zero(3) | UNUSED,
        },
    ),
    (
        "CPU offload, accumulation",
        {
            "ZeRO-1": _zero(1) | OFFLOAD | MICRO,
            "ZeRO-2": _zero(2) | OFFLOAD | MICRO,
            "ZeRO-3": _zero(3) | OFFLOAD | MICRO,
        },
    ),
    (
        "several `backward` calls a step",
        {"ZeRO-2": _zero(2) | SEVERAL, "ZeRO-3": _zero(3) | SEVERAL},
    ),
    (
        "several `backward` calls a step, CPU offload",
        {"ZeRO-1": _zero(1) | SEVERAL | OFFLOAD, "ZeRO-2": _zero(2) | SEVERAL | OFFLOAD},
    ),
    (
        "pipeline",
        {
            "plain": PIPELINE,
            "tied": PIPELINE | TIED,
            "tied, ZeRO-1, bf16, 4 ranks": _zero(1, "bf16") | PIPELINE | TIED | {"ranks": 4},
        },
    ),
    ("pipeline, stage 0, clip", {"plain": PIPELINE | CLIP}),
    (
        "pipeline, accumulation",
        {
            "plain": PIPELINE | MICRO,
            "ZeRO-1, bf16": _zero(1, "bf16") | PIPELINE | MICRO | FP32_GRADIENTS,
            "ZeRO-1, 4 ranks": _zero(1) | PIPELINE | MICRO | {"ranks": 4},
        },
    ),
    (
        "a second loss outside `forward`",
        {"stage 0": AUXILIARY, "ZeRO-2, bf16": _zero(2, "bf16") | AUXILIARY},
    ),
    (
        "a second loss outside `forward`, accumulation",
        {
            "stage 0": AUXILIARY | MICRO,
            "ZeRO-2, bf16": _zero(2, "bf16") | AUXILIARY | MICRO,
            "ZeRO-3": _zero(3) | AUXILIARY | MICRO,
        },
    ),
    (
        "recomputed activations",
        {
            "ZeRO-2": _zero(2) | {"shape": Shape(recompute="non-reentrant")},
            "ZeRO-2, reentrant": _zero(2) | REENTRANT,
            "ZeRO-3, reentrant": _zero(3) | REENTRANT,
        },
    ),
    (
        "Muon, bf16",
        {
            "ZeRO-1": _zero(1, "bf16") | MUON | WHOLE,
            "ZeRO-2, accumulation": _zero(2, "bf16") | MUON | WHOLE | MICRO,
        },
    ),
    ("Muon, ZeRO-3", {"plain": _zero(3, "bf16") | MUON | WHOLE}),
    ("Muon, ZeRO-3, accumulation", {"plain": _zero(3, "bf16") | MUON | WHOLE | MICRO}),
    ("Muon, fp16", {"plain": _zero(2, "fp16") | MUON | WHOLE}),
    (
        "Muon, fp16, overflow",
        {
            "at first": _zero(2, "fp16") | MUON | WHOLE | {"overflow": 1},
            "later": _zero(2, "fp16") | MUON | WHOLE | {"overflow": 2},
        },
    ),
    (
        "torch_autocast",
        {
            "stage 0": _zero(0) | AUTOCAST,
            "ZeRO-2, clip": _zero(2) | AUTOCAST | CLIP,
            "ZeRO-3, accumulation": _zero(3) | AUTOCAST | MICRO,
        },
    ),
)
# Values that every two of occur together in one of the combinations.
AXES: dict[str, Sequence[Any]] = {
    "stage": (2, 1, 3),
    "dtype": ("fp32", "bf16", "fp16"),
    "recompute": ("", "non-reentrant", "reentrant"),
    "accumulation": (1, 3),
    "clip": (0.0, 0.5),
    "offload_optimizer": (False, True),
    "overlap_comm": (True, False),
    "contiguous_gradients": (True, False),
    "reduce_bucket_size": (700, 500_000_000),  # several buckets, or one
    "tied": (False, True),
}
COMBINATIONS = "combinations of options"


def covering(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few choices of a value for each axis, in which any two values of two axes meet.

    Greedy: each choice begins with a pair that is missing, and takes for each further axis the value
    that brings the most missing pairs.
    """
    missing = [
        ((one, a), (other, b))
        for one, other in combinations(axes, 2)
        for a in axes[one]
        for b in axes[other]
    ]
    rows = []
    while missing:
        row = dict(missing[0])
        for axis, values in axes.items():
            if axis not in row:
                new = [_met(row | {axis: value}, missing) for value in values]
                row[axis] = values[new.index(max(new))]
        missing = [pair for pair in missing if not all(row[axis] == v for axis, v in pair)]
        rows.append({axis: row[axis] for axis in axes})
    return rows


def _met(row: Mapping[str, Any], pairs: Sequence[tuple[tuple[str, Any], tuple[str, Any]]]) -> int:
    return sum(all(axis in row and row[axis] == value for axis, value in pair) for pair in pairs)


def _combination(row: Mapping[str, Any]) -> Probe:
    zero = {k: row[k] for k in ("overlap_comm", "contiguous_gradients", "reduce_bucket_size")}
    words = [f"ZeRO-{row['stage']}", row["dtype"]]
    words += [f"recompute {row['recompute']}"] * bool(row["recompute"])
    words += ["accumulation"] * (row["accumulation"] > 1) + ["clip"] * (row["clip"] > 0)
    words += ["CPU offload"] * row["offload_optimizer"] + ["overlap"] * row["overlap_comm"]
    words += ["gradients not contiguous"] * (not row["contiguous_gradients"])
    words += ["small buckets"] * (row["reduce_bucket_size"] < 1000) + ["tied"] * row["tied"]
    return Probe(
        f"{COMBINATIONS}: {', '.join(words)}",
        COMBINATIONS,
        stage=row["stage"],
        dtype=row["dtype"],
        accumulation=row["accumulation"],
        clip=row["clip"],
        shape=Shape(tied=row["tied"], recompute=row["recompute"]),
        zero=zero | (OFFLOAD["zero"] if row["offload_optimizer"] else {}),
    )


PROBES: tuple[Probe, ...] = (
    *(
        replace(Probe(f"{feature}: {detail}", feature), **changes)
        for feature, probes in GROUPS
        for detail, changes in probes.items()
    ),
    *(_combination(row) for row in covering(AXES)),
)
FEATURES = tuple(dict.fromkeys(probe.feature for probe in PROBES))
