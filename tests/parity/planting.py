"""How the tests plant a fault inside the ranks, and what they look for."""

from collections.abc import Callable
from typing import Any
from unittest import mock

from launch.parity.compare import Difference

Fault = Callable[[], None]


def plant(owner: Any, name: str, wrong: Any) -> None:
    """Put `wrong` in the place of a function, for the rest of this process."""
    mock.patch.object(owner, name, wrong).start()  # the process ends with the run


def first_seen(differences: list[Difference]) -> list[str]:
    """The quantities that are past their tolerance, by the step at which they first are."""
    by_step = sorted(
        (int(d.where.split()[1]), d.quantity != "loss", d.quantity)
        for d in differences
        if d.past and d.where.startswith("step")
    )
    found = [f"{quantity} at step {step}" for step, _, quantity in by_step]
    return found + sorted({d.quantity for d in differences if d.past and "step" not in d.where})
