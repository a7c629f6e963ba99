"""Judge what a probe measured, and keep it: one JSON object a line for each version and probe."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.errors import UserError
from launch.versions.probes import BLOCKS, Probe

Weights = dict[str, NDArray[np.float32]]
OK, WRONG, NOT_RUN, NOT_THERE = "ok", "wrong", "not run", "not there"
EPS = {"fp32": 2.0**-23, "bf16": 2.0**-7, "autocast": 2.0**-7, "fp16": 2.0**-10}


@dataclass
class Record:
    """What a run leaves. `norms` holds None where an engine tells no gradient norm.

    `muon` names the weights that DeepSpeed gave to Muon: its first versions took more of them.
    """

    losses: list[float]
    norms: list[float | None]
    weights: Weights
    muon: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Difference:
    """The worst of one kind: "loss", "gradient norm" or "update". `value` is relative."""

    quantity: str
    where: str
    value: float
    bound: float

    @property
    def share(self) -> float:
        """The difference as a share of its bound; infinite where it is NaN."""
        return self.value / self.bound if self.value == self.value else float("inf")


@dataclass
class Result:
    """One probe under one version of DeepSpeed."""

    deepspeed: str
    probe: str
    status: str
    reason: str = ""
    differences: list[Difference] = field(default_factory=list)
    seconds: float = 0.0
    run: str = ""  # torch, Python and the day, for the page


def bounds(probe: Probe) -> dict[str, float]:
    """The largest relative differences that rounding can cause.

    As in `launch/parity/compare.py`: fixed in fp32, where only the order of sums differs, and
    multiples of `1.03**depth * eps` in 16 bits, after Megatron-LM's `test_optimizer_grads_match`.
    An update is what all steps together add to a tensor. SGD makes it proportional to the gradients,
    and its bound that of a gradient. Adam takes full steps also where a gradient is near zero, and
    Muon orthogonalises in 16 bits: there rounding changes more.
    """
    unit = 1.03**BLOCKS * EPS[probe.dtype]
    if probe.dtype == "fp32":
        found = {"loss": 2e-6, "gradient norm": 5e-6, "update": 2e-5}
    else:
        found = {"loss": unit / 2, "gradient norm": unit, "update": 4 * unit}
    if probe.optimizer == "muon":
        found["update"] = 0.15
    elif probe.optimizer == "adamw":
        found["update"] *= 4
    return found


def compare(
    probe: Probe, initial: Weights, expected: Record, ranks: Sequence[Record]
) -> list[Difference]:
    """The worst difference of each kind that is past its bound, or the one that is nearest to it.

    Raises:
        ValueError: if the ranks together do not hold the reference's weights.
    """
    limits = bounds(probe)
    held = set().union(*(record.weights for record in ranks))
    if held != expected.weights.keys():
        raise ValueError(f"weights differ: {sorted(held ^ expected.weights.keys())}")
    found = []
    for step, loss in enumerate(expected.losses):
        got = float(np.mean([record.losses[step] for record in ranks]))
        found.append(Difference("loss", f"step {step + 1}", abs(got / loss - 1), limits["loss"]))
    # Muon replaces the gradient before DeepSpeed takes its norm.
    for step, norm in enumerate([] if probe.optimizer == "muon" else expected.norms):
        for record in ranks:
            told = record.norms[step]
            if norm is not None and told is not None:
                away = abs(told / norm - 1)
                found.append(
                    Difference("gradient norm", f"step {step + 1}", away, limits["gradient norm"])
                )
    for record in ranks:
        found += [
            _update(probe, name, initial[name], expected.weights[name], weight, limits["update"])
            for name, weight in record.weights.items()
        ]
    past = [each for each in found if each.share > 1.0]
    kinds = dict.fromkeys(each.quantity for each in past)
    worst = [max((d for d in past if d.quantity == k), key=lambda d: d.share) for k in kinds]
    return worst or [max(found, key=lambda d: d.share)]


def _update(
    probe: Probe, name: str, initial: Any, expected: Any, got: Any, limit: float
) -> Difference:
    size = float(np.linalg.norm(expected - initial))
    away = float(np.linalg.norm(got - expected))
    if size == 0.0:
        return Difference("update", name, float("inf") if away else 0.0, limit)
    # The weights themselves are rounded when they are written.
    kept = (
        EPS["fp32" if probe.dtype == "autocast" else probe.dtype]
        * float(np.linalg.norm(expected))
        / size
    )
    return Difference("update", name, away / size, limit + kept)


def judge(differences: Sequence[Difference]) -> str:
    """OK or WRONG."""
    return OK if all(each.share <= 1.0 for each in differences) else WRONG


def to_json(result: Result) -> dict[str, Any]:
    """The object of a line: what is empty is left out, and numbers have three digits."""
    values = {name: value for name, value in asdict(result).items() if value}
    values["differences"] = [
        [each.quantity, each.where, float(f"{each.value:.3g}"), float(f"{each.bound:.3g}")]
        for each in result.differences
    ]
    return values


def from_json(values: dict[str, Any]) -> Result:
    """A result from the object that a line holds.

    Raises:
        TypeError, KeyError: if it is none.
    """
    differences = [Difference(*each) for each in values["differences"]]
    return Result(**{**values, "differences": differences})


def append(file: Path, result: Result) -> None:
    """Add a result to a file, which is created if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(to_json(result)) + "\n")


def read(file: Path) -> list[Result]:
    """The results of a file, the last one of each version and probe; none where there is no file.

    Raises:
        UserError: if a line is none of ours.
    """
    latest: dict[tuple[str, str], Result] = {}
    for result in _lines(file) if file.exists() else ():
        latest[result.deepspeed, result.probe] = result
    return list(latest.values())


def _lines(file: Path) -> Iterator[Result]:
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            yield from_json(json.loads(line))
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{file}, line {number}: no result of scripts/versions.py") from None
