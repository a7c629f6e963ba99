"""What a seeded fault is: how it is planted, where parity sees it first, and where it is."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.parity.cases import Case

Fault = Callable[[], None]

FEW_ROWS = "train.global_batch_size=4"  # for the cases of `make test`
LOSS_1, LOSS_2, LOSS_3, LOSS_4 = (f"loss at step {step}" for step in (1, 2, 3, 4))
NORM_1, NORM_2, NORM_3 = (f"grad norm at step {step}" for step in (1, 2, 3))
WEIGHTS = "weights"


@dataclass(frozen=True)
class Seeded:
    """A fault, planted in the ranks of a layout and not in the reference.

    Attributes:
        fault: plants it; a rank calls it before it does anything else.
        case: the cheapest case that shows it.
        seen: what `scripts/parity.py` sees first.
        phase: of a step, as `launch/parity/recorder.py` names them.
        name: a pattern for the module or parameter that `--bisect` has to name.
        quantity: of a module: its input, its output, or the gradient of one of them.
        step: at which it appears.
        ranks: on which it appears.
        changes: for `Case.recipe`; without one of EPS_KEY, that is `compositions.EPS`: with the
            usual one, rounding alone passes a bound on some processors.
        refused: without the fault, this case is an error.
        missed: why `--bisect` names another place; empty: it names this one.
        more: further cases, and what is seen first in them.
    """

    fault: Fault
    case: Case
    seen: str
    phase: str
    name: str
    quantity: str = ""
    step: int = 1
    ranks: tuple[int, ...] = (0,)
    changes: dict[str, Any] | None = None
    refused: bool = False
    missed: str = ""
    more: tuple[tuple[Case, str], ...] = field(default=())

    @property
    def steps(self) -> int | None:
        """How many show it; None: all, as it is seen in the last weights."""
        seen = re.search(r"at step (\d+)$", self.seen)
        return max(self.step, int(seen[1])) if seen else None

    @property
    def id(self) -> str:
        """For pytest's list."""
        return self.fault.__name__

    def is_seen(self, seen: list[str]) -> bool:
        """Whether parity has seen it as it should; the last weights, at whichever place in the list."""
        return self.seen in (seen if self.seen == WEIGHTS else seen[:1])
