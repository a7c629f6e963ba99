"""The axes of the certificate: features that compose, and the values that each can take.

A value of one axis says nothing of another: which of them go together is for the project's own checks
to say (`compositions.py`).
"""

from itertools import combinations
from typing import Any

Row = dict[str, Any]

# The first value of each axis is the usual one. Sizes are small and uneven: 5 layers on 2 or 4 stages,
# 321 tokens on 2 or 4 tensor ranks.
AXES: dict[str, tuple[Any, ...]] = {
    "stage": (0, 1, 2, 3),
    "tensor": (1, 2, 4),
    "pipeline": (1, 2, 4),
    "accumulation": (4, 1),  # micro batches that a rank, or a pipeline, adds up in a step
    "checkpointing": (False, True),
    "tied": (True, False),
    "clip": ("binding", "loose", "off"),  # below every step's gradient norm, far above it, or 0
    "offload": ("none", "optimizer", "all", "nvme"),  # the first three: to the CPU's memory
    "compile": (False, True),
    "family": ("gpt2", "llama", "qwen3", "hf_llama", "hf_qwen3"),  # hf: of transformers
    "precision": ("fp32", "bf16", "fp16", "autocast"),  # autocast: fp32 weights, bf16 products
    "data": (1, 2),
    "sums": ("fp32", "own"),  # what gradients are added up in; own: the weights' dtype
    "sequence": (False, True),
    "schedule": ("1f1b", "gpipe", "naive"),
    "partition": ("parameters", "uniform", "type:block"),
    "layers": (2, 5),
    "vocab": (320, 321),
    "micro_batch": (1, 2),
    "weights": ("equal", "unequal"),  # of the labels, as launch/parity/weights.py has them
    "documents": (False, True),  # attention within them alone
}
# What meets in the certificate, where it composes: all triples, and so all pairs; of the axes that decide
# how a model is cut and kept, all quadruples; and each ZeRO stage on each layout of ranks in every
# precision, and with every family.
TOGETHER = (
    *combinations(AXES, 3),
    *combinations(("stage", "tensor", "pipeline", "offload", "precision", "data"), 4),
    ("stage", "tensor", "pipeline", "precision", "data"),
    ("stage", "tensor", "pipeline", "family"),
)
USUAL: Row = {axis: values[0] for axis, values in AXES.items()}


def ranks(row: Row) -> int:
    """The number of ranks that a row runs on."""
    return int(row["tensor"] * row["pipeline"] * row["data"])


def name(row: Row) -> str:
    """A row's values that are not the usual ones, such as "stage=2 tensor=2"; "usual" if none."""
    changed = [f"{axis}={show(row[axis])}" for axis in AXES if row[axis] != USUAL[axis]]
    return " ".join(changed) or "usual"


def show(value: Any) -> str:
    """A value as it is written in names and tables."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
