"""Faults of sequence parallelism: what ranks that hold different tokens have to exchange."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from tests.parity.cases import Case
from tests.parity.faults.seeded import FEW_ROWS, LOSS_1, NORM_1, WEIGHTS, Seeded
from tests.parity.kinds import SEQUENCE, TP2
from tests.parity.planting import plant


def norms_of_other_tokens_not_summed() -> None:
    """Also those of other heads, where queries and keys are normalised."""
    from models import norms

    plant(norms, "copy_to_group", lambda x, group: x)


def row_bias_of_other_tokens_not_summed() -> None:
    from models.parallel import tensor_parallel

    plant(tensor_parallel, "copy_to_group", lambda x, group: x)


def sequence_parallel_gather_without_a_sum() -> None:
    """Its backward takes this rank's part, where it has to sum over the ranks first."""
    from models.parallel import tensor_parallel
    from models.parallel.collectives import gather_from_group

    plant(tensor_parallel, "all_gather", gather_from_group)


def sequence_parallel_scatter_without_a_sum() -> None:
    from models.parallel import tensor_parallel
    from models.parallel.collectives import scatter_to_group

    plant(tensor_parallel, "reduce_scatter", scatter_to_group)


def tokens_of_the_ranks_swapped() -> None:
    from models import gpt

    right = vars(gpt)["scatter_to_group"]

    def wrong(x: Tensor, dim: int, group: Any) -> Any:
        return right(x.roll(x.shape[dim] // 2, dim), dim, group)

    plant(gpt, "scatter_to_group", wrong)


def gradients_of_other_tokens_not_gathered() -> None:
    """Below the scatter of sequence parallelism, each rank knows the gradients of its own tokens."""
    from models import gpt

    def wrong(x: Tensor, dim: int, group: Any) -> Tensor:
        return x.chunk(2, dim)[dist.get_rank(group)].contiguous()

    plant(gpt, "scatter_to_group", wrong)


TOKENS, BOTH = (TP2, SEQUENCE), (0, 1)
SHARDED = Case("zero1", 2, overrides=(FEW_ROWS, *TOKENS))
GRADIENTS, FIRST_OUT = "parameter gradients", r"blocks\.0\.attention\.out"
OF_IN, OUT = "gradient of its input", "its output"
FAULTS = [
    Seeded(
        norms_of_other_tokens_not_summed, SHARDED, NORM_1, GRADIENTS,
        r"blocks\.0\.attention_norm\.weight", ranks=BOTH,
        more=(
            (Case("zero1", 2, "bf16", overrides=TOKENS), WEIGHTS),
            (Case("zero3", 4, overrides=TOKENS), NORM_1),
        ),
    ),
    Seeded(
        row_bias_of_other_tokens_not_summed, SHARDED, NORM_1, GRADIENTS,
        r"blocks\.0\.attention\.out\.bias", ranks=BOTH,
    ),
    Seeded(
        sequence_parallel_gather_without_a_sum, SHARDED, NORM_1, "backward", "output", OF_IN,
        ranks=BOTH,
    ),
    Seeded(
        sequence_parallel_scatter_without_a_sum, SHARDED, LOSS_1, "forward", FIRST_OUT, OUT,
        ranks=BOTH,
    ),
    Seeded(
        tokens_of_the_ranks_swapped, SHARDED, LOSS_1, "forward", r"embedding\.position", OUT,
        ranks=BOTH,
    ),
    Seeded(
        gradients_of_other_tokens_not_gathered, SHARDED, NORM_1, "backward",
        r"embedding\.position", OF_IN, ranks=BOTH,
    ),
]  # fmt: skip
