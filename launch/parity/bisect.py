"""Where does a layout first differ from one device? Compare what both compute, in its order.

Within a step the order is that of `PHASES`: the batch, the forward pass module by module, the loss,
the backward pass, the parameters' gradients, their norm, the learning rate, and what the optimizer
makes of them. The first difference in that order is the nearest to its cause: whatever comes before
it was right, on every rank and in every micro batch.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from launch.parity.compare import Tolerances
from launch.parity.recorder import INPUT, PHASES, Cut, Key, Recording

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 6  # differences in the table


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
        apart = "is missing" if math.isinf(self.value) else f"differs by {self.value:.1e}"
        phase = "" if self.phase == self.name else f"{self.phase}, "
        return (
            f"step {self.step}, {phase}{where}: {self.name}{quantity} {apart} "
            f"(bound {self.bound:.1g})"
        )


def bounds(key: Key, dims: int, limits: Tolerances) -> float:
    """The largest difference of a recorded tensor that rounding explains.

    Batches and initial weights are the same bits. Activations and their gradients round like
    matrices; the gradients of vectors are sums over all tokens, as the vectors themselves.
    """
    if key.phase in ("batch", "weights before"):
        return 0.0
    if key.phase == "loss":
        first = key.step == 1 and key.quantity == "of the step"
        return limits.first_loss if first else limits.loss
    if key.phase == "grad norm":
        return limits.grad_norm
    if key.phase == "learning rate":
        return 1e-12
    if key.phase in ("forward", "backward"):
        return limits.matrices
    return limits.matrices if dims >= 2 else limits.vectors


def differences(
    reference: Recording,
    ranks: Mapping[int, Recording],
    limits: Tolerances,
    free_rows: Mapping[str, slice],
) -> list[Place]:
    """All places at which a rank differs from the reference, the first one first.

    `free_rows` (see `launch.parity.compare.key_biases`) are left out, with the keys that they move.
    """
    order = {_place_key(key): i for i, key in reversed(list(enumerate(reference.tensors)))}
    found: dict[tuple[int, str, str, str], dict[int, tuple[float, float]]] = {}
    for rank, recording in ranks.items():
        for key, expected, got in _pairs(reference, recording, free_rows):
            bound = bounds(key, expected.dim(), limits)
            value = _apart(expected, got)
            if not value <= bound:
                worst = found.setdefault((key.step, *key[1:4]), {})
                worst[rank] = max(worst.get(rank, (0.0, 0.0)), (value, bound))
    places = [
        Place(*place, tuple(sorted(by_rank)), *max(by_rank.values()))
        for place, by_rank in found.items()
    ]
    return sorted(
        places, key=lambda p: (p.step, PHASES.index(p.phase), order[p.phase, p.name, p.quantity])
    )


def _place_key(key: Key) -> tuple[str, str, str]:
    return key.phase, key.name, key.quantity


def _pairs(
    reference: Recording, recording: Recording, free_rows: Mapping[str, slice]
) -> Iterator[tuple[Key, "Tensor", "Tensor | None"]]:
    """What a rank has computed, or should have, beside the same part of the reference."""
    data_rank, data_size = recording.place["data"]
    seen = {_place_key(key) for key in recording.tensors}
    modules = {key.name for key in recording.tensors if key.phase == "forward"}
    for key, whole in reference.tensors.items():
        micro_batch, other = divmod(key.micro_batch, data_size)
        of_step = key.phase not in ("batch", "forward", "backward") and not (
            key.quantity == "of a micro batch"
        )
        if not of_step and other != data_rank:
            continue
        own = recording.tensors.get(key._replace(micro_batch=micro_batch))
        expected_here = _place_key(key) in seen or (
            key.phase == "backward" and key.name in modules
        )
        if own is None:
            if expected_here:
                yield key, whole, None
            continue
        free = free_rows.get(key.name) or free_rows.get(f"{key.name}.bias")
        part = _part(_without(key, whole, free), own.shape, recording, key)
        if part is not None:
            yield key, part, own


def _without(key: Key, whole: "Tensor", rows: slice | None) -> "Tensor":
    """The reference with NaN where nothing is to be compared."""
    if rows is None or not whole.is_floating_point():
        return whole
    if key.phase == "forward" and (key.quantity == INPUT or key.step == 1):
        return whole
    if key.phase == "backward":
        return whole
    left = whole.clone()
    left[..., rows] = math.nan
    return left


def _part(
    whole: "Tensor", shape: Iterable[int], recording: Recording, key: Key
) -> "Tensor | None":
    """What a rank should hold of a tensor, given the shape of what it holds; None: not known.

    This is written anew, not taken from `Shard.cut`, which may be what is wrong.
    """
    rank, size = recording.place["tensor"]
    cut = recording.cuts.get(key.name)
    for dim, local in enumerate(shape):
        full = whole.shape[dim]
        if local == full:
            continue
        if cut and sum(cut.parts or cut.sizes) == full:
            whole = _cut_part(whole, dim, cut, rank, size)
        elif full % local == 0:
            chunks = full // local  # fewer than ranks where ranks share a key/value head
            whole = whole.narrow(dim, rank * chunks // size * local, local)
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


def _apart(expected: "Tensor", got: "Tensor | None") -> float:
    if got is None:
        return math.inf
    if not expected.is_floating_point():
        return float((got != expected).float().mean())
    expected, got = expected.double(), got.double().view_as(expected)
    counted = ~expected.isnan()
    apart = float((got[counted] - expected[counted]).norm())
    size = float(expected[counted].norm())
    if math.isnan(apart):
        return math.inf
    return apart / size if size else apart and math.inf
