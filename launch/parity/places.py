"""Compare the recordings of one device and of a layout's ranks; see `bisect.py`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from launch.parity.compare import Tolerances
from launch.parity.recorder import BEFORE, MICRO_BATCH, OUTPUT, PHASES, STEP, Cut, Key, Recording

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where something differs from one device, and by how much, relative to the reference's norm.

    `ranks` are those on which it does; `value` is the largest, infinite for what is missing.
    """

    step: int
    phase: str
    name: str
    quantity: str
    ranks: tuple[int, ...]
    value: float
    bound: float

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        where = f"rank{'s' if len(self.ranks) > 1 else ''} {ranks}"
        quantity = f" ({self.quantity})" if self.quantity else ""
        apart = (
            "is missing or not a number"
            if math.isinf(self.value)
            else f"differs by {self.value:.1e}"
        )
        phase = "" if self.phase == self.name else f"{self.phase}, "
        return (
            f"step {self.step}, {phase}{where}: {self.name}{quantity} {apart} "
            f"(bound {self.bound:.1g})"
        )


def bounds(key: Key, dims: int, limits: Tolerances) -> float:
    """The largest difference of a recorded tensor that rounding explains.

    Batches and initial weights are the same bits. A gradient in 16 bits may be off by
    4 x 1.03^layers x eps, as in Megatron-LM's test: twice the bound of matrices. Activations get the
    same. The loss of a micro batch is a mean over few tokens, whose errors do not cancel as well.
    """
    if key.phase in ("batch", BEFORE):
        return 0.0
    if key.phase == "loss":
        first = key.step == 1 and key.quantity == STEP
        if key.quantity == MICRO_BATCH:
            return 10 * limits.loss
        return limits.first_loss if first else limits.loss
    if key.phase == "grad norm":
        return limits.grad_norm
    if key.phase == "learning rate":
        return 1e-12
    if key.phase == "weights" or (dims < 2 and key.phase not in ("forward", "backward")):
        return limits.matrices if dims >= 2 else limits.vectors
    return 2 * limits.matrices


def differences(
    reference: Recording,
    ranks: Mapping[int, Recording],
    limits: Tolerances,
    free_rows: Mapping[str, slice],
) -> list[Place]:
    """The places of the first step at which a rank differs from the reference, the first one first.

    `free_rows` (see `launch.parity.compare.key_biases`) are left out, with the keys that they move.
    """
    order: dict[tuple[str, str, str], int] = {}
    for key in reference.tensors:
        order.setdefault(_kind(key), len(order))
    steps = sorted({key.step for key in reference.tensors})
    for step in steps:
        found: dict[tuple[str, str, str], dict[int, tuple[float, float]]] = {}
        for rank, recording in ranks.items():
            for key, expected, got in pairs(reference, recording, step, free_rows):
                bound = bounds(key, expected.dim(), limits)
                value = distance(expected, got)
                if not value <= bound:
                    worst = found.setdefault(_kind(key), {})
                    worst[rank] = max(worst.get(rank, (0.0, 0.0)), (value, bound))
        if found:
            return [
                Place(step, *kind, tuple(sorted(found[kind])), *max(found[kind].values()))
                for kind in sorted(found, key=lambda kind: (PHASES.index(kind[0]), order[kind]))
            ]
    return []


def _kind(key: Key) -> tuple[str, str, str]:
    return key.phase, key.name, key.quantity


def pairs(
    reference: Recording, recording: Recording, step: int, free_rows: Mapping[str, slice]
) -> Iterator[tuple[Key, "Tensor", "Tensor | None"]]:
    """What a rank has computed in a step, beside the same part of the reference.

    The second is None for what the rank should have, and has not: a gradient that never came.
    """
    data_rank, data_size = recording.place["data"]
    seen = {_kind(key) for key in recording.tensors}
    seen |= {
        ("backward", name, f"gradient of {of}") for phase, name, of in seen if phase == "forward"
    }
    for key, whole in reference.tensors.items():
        if key.step != step or _kind(key) not in seen:
            continue
        own_key = key
        if key.phase in ("batch", "forward", "backward") or key.quantity == MICRO_BATCH:
            micro_batch, other = divmod(key.micro_batch, data_size)
            if other != data_rank:
                continue
            own_key = key._replace(micro_batch=micro_batch)
        own = recording.tensors.get(own_key)
        if own is None:
            yield key, whole, None
            continue
        rows = free_rows.get(key.name) or free_rows.get(f"{key.name}.bias")
        part = _part(_without(key, whole, rows), own.shape, recording, key.name)
        if part is not None:
            yield key, part, own


def _without(key: Key, whole: "Tensor", rows: slice | None) -> "Tensor":
    """The reference with NaN where there is nothing to compare: key biases, and keys that have one."""
    of_keys = key.phase == "forward" and key.quantity == OUTPUT and key.step > 1
    if rows is None or not (of_keys or key.phase in ("weights", "first moments")):
        return whole
    left = whole.clone()
    left[..., rows] = math.nan
    return left


def _part(
    whole: "Tensor", shape: Sequence[int], recording: Recording, name: str
) -> "Tensor | None":
    """What a rank should hold of a tensor, by the shape of what it does hold; None: not known.

    Written anew and not taken from `Shard.cut`, which may be what is wrong.
    """
    rank, size = recording.place["tensor"]
    cut = recording.cuts.get(name)
    for dim, local in enumerate(shape):
        full = whole.shape[dim]
        if local == full:
            continue
        if cut and sum(cut.parts or cut.sizes) == full:
            whole = _cut_part(whole, dim, cut, rank, size)
        elif full % local == 0:
            # Fewer pieces than ranks: ranks that share a key head.
            whole = whole.narrow(dim, rank * (full // local) // size * local, local)
        else:
            return None
    return whole


def _cut_part(whole: "Tensor", dim: int, cut: Cut, rank: int, size: int) -> "Tensor":
    if cut.sizes:
        return whole.narrow(dim, sum(cut.sizes[:rank]), cut.sizes[rank])
    pieces = []
    for part in whole.split(cut.parts, dim):
        width = math.ceil(part.shape[dim] / size)
        missing = list(part.shape)
        missing[dim] = width * size - part.shape[dim]
        padded = torch.cat((part, part.new_zeros(missing)), dim)
        pieces.append(padded.narrow(dim, rank * width, width))
    return torch.cat(pieces, dim)


def distance(expected: "Tensor", got: "Tensor | None") -> float:
    """The norm of the difference over the norm of `expected` (absolute, if that is 0).

    NaN in `expected` count for nothing; NaN in `got`, or nothing at all, is infinitely far away.

    For integers, the share of those that differ.
    """
    if got is None:
        return math.inf
    if not expected.is_floating_point():
        return float((got != expected).float().mean())
    apart = got.view_as(expected) - expected
    if bool((ignored := expected.isnan()).any()):
        apart, expected = apart[~ignored], expected[~ignored]
    change = float(torch.linalg.vector_norm(apart, dtype=torch.float64))
    size = float(torch.linalg.vector_norm(expected, dtype=torch.float64))
    return math.inf if math.isnan(change) else change / (size or 1.0)
