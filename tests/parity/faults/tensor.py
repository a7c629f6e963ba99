"""Faults of tensor and sequence parallelism. None of them raises anything.

`tests/unit/test_tp_faults.py` shows what some of them do to a single layer.
"""

import os
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.parity.cases import Case
from tests.parity.faults.seeded import FEW_ROWS, LOSS_1, LOSS_2, NORM_1, Seeded
from tests.parity.kinds import PP2, SEQUENCE, TP2
from tests.parity.planting import plant


def backward_all_reduce_dropped() -> None:
    from models.parallel.collectives import _Copy

    plant(_Copy, "backward", staticmethod(lambda ctx, gradient: (gradient, None)))


def row_parallel_sum_without_autograd() -> None:
    from models.parallel import tensor_parallel

    def wrong(x: Tensor, group: Any) -> Tensor:
        summed = x.detach().clone()
        dist.all_reduce(summed, group=group)
        return summed

    plant(tensor_parallel, "reduce_from_group", wrong)


def row_parallel_sum_summed_on_the_way_back_too() -> None:
    from models.parallel import collectives, tensor_parallel

    def wrong(x: Tensor, group: Any) -> Tensor:
        return collectives.copy_to_group(collectives.reduce_from_group(x, group), group)

    plant(tensor_parallel, "reduce_from_group", wrong)


def row_parallel_sum_left_out() -> None:
    from models.parallel.tensor_parallel import RowParallelLinear

    def wrong(self: RowParallelLinear, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)

    plant(RowParallelLinear, "forward", wrong)


def row_bias_added_on_every_rank() -> None:
    from torch.nn.functional import linear

    from models.parallel.collectives import reduce_from_group
    from models.parallel.tensor_parallel import RowParallelLinear

    def wrong(self: RowParallelLinear, x: Tensor) -> Tensor:
        return reduce_from_group(linear(x, self.weight, self.bias), self.group)

    plant(RowParallelLinear, "forward", wrong)


def embedding_not_summed() -> None:
    from models.parallel.tensor_parallel import VocabParallelEmbedding

    def wrong(self: VocabParallelEmbedding, tokens: Tensor) -> Tensor:
        width = self.weight.shape[0]
        rows = tokens - dist.get_rank(self.group) * width
        elsewhere = (rows < 0) | (rows >= width)
        found = torch.nn.functional.embedding(rows.masked_fill(elsewhere, 0), self.weight)
        return found.masked_fill(elsewhere.unsqueeze(-1), 0.0)

    plant(VocabParallelEmbedding, "forward", wrong)


def embedding_shard_off_by_one_row() -> None:
    from models.parallel.tensor_parallel import VocabParallelEmbedding

    right = VocabParallelEmbedding.forward
    plant(VocabParallelEmbedding, "forward", lambda self, tokens: right(self, tokens - 1))


def residual_dropped_on_rank_1() -> None:
    from models.gpt import Block

    right = Block.forward

    def wrong(self: Block, x: Tensor, inputs: Any) -> Tensor:
        out = right(self, x, inputs)
        return out - x if dist.get_rank() == 1 else out

    plant(Block, "forward", wrong)


def shards_not_marked_for_the_norm() -> None:
    from launch.training import engine
    from launch.training.optimizer import parameter_groups

    def wrong(model: Any) -> Any:
        """Row-parallel shards look like copies, of which one counts."""
        for name, parameter in model.named_parameters():
            if name.endswith(("mlp.down.weight", "attention.out.weight")):
                parameter.tensor_model_parallel = False
        return parameter_groups(model)

    plant(engine, "parameter_groups", wrong)


def copies_counted_on_each_rank_in_the_norm() -> None:
    from launch.training import engine
    from launch.training.optimizer import parameter_groups

    def wrong(model: Any) -> Any:
        """Norms and row biases look like shards."""
        for parameter in model.parameters():
            parameter.tensor_model_parallel = True
        return parameter_groups(model)

    plant(engine, "parameter_groups", wrong)


def shards_swapped() -> None:
    """Weights are cut for the other rank, and merged in the order of the ranks."""
    from models.parallel.tensor_parallel import Shard

    right = Shard.cut

    def wrong(self: Shard, whole: Tensor) -> Tensor:
        return right(Shard(self.dim, self.parts, self.size - 1 - self.rank, self.size), whole)

    plant(Shard, "cut", wrong)


def _cut_as_one(parts: int) -> None:
    from models.parallel.tensor_parallel import Shard

    right = Shard.cut

    def wrong(self: Shard, whole: Tensor) -> Tensor:
        if len(self.parts) == parts:
            return whole.chunk(self.size, self.dim)[self.rank]
        return right(self, whole)

    plant(Shard, "cut", wrong)


def queries_keys_and_values_cut_as_one_matrix() -> None:
    _cut_as_one(3)  # rank 0 of 2 has the queries and half of the keys


def gate_and_up_cut_as_one_matrix() -> None:
    _cut_as_one(2)


def each_shard_drawn_by_itself() -> None:
    """Initial weights: a rank draws as much as it holds, from a seed of its own."""
    from launch.training import build_model

    right = vars(build_model)["initialize_parameters"]

    def wrong(parameters: Any, config: Any, seed: int, *gather: Any) -> None:
        right(parameters, config, seed + int(os.environ["RANK"]), *gather)

    plant(build_model, "initialize_parameters", wrong)


def padding_counted_as_words() -> None:
    """Columns that pad the vocabulary are in the sum of the softmax."""
    from models import gpt

    right = vars(gpt)["vocab_parallel_cross_entropy"]

    def wrong(logits: Tensor, labels: Tensor, weights: Any, vocab: int, group: Any) -> Any:
        return right(logits, labels, weights, logits.shape[-1] * dist.get_world_size(group), group)

    plant(gpt, "vocab_parallel_cross_entropy", wrong)


def each_rank_subtracts_its_own_largest_logit() -> None:
    from models.parallel import cross_entropy
    from models.parallel.collectives import all_reduce

    def wrong(x: Tensor, group: dist.ProcessGroup, maximum: bool = False) -> Tensor:
        return x if maximum else all_reduce(x, group)

    plant(cross_entropy, "all_reduce", wrong)


def label_taken_away_on_every_rank() -> None:
    """The gradient of the logits: each rank has a column for the label."""
    from models.parallel.cross_entropy import _VocabParallelCrossEntropy

    right = _VocabParallelCrossEntropy.backward

    def wrong(ctx: Any, gradient: Tensor) -> Any:
        probabilities, mine, column, weights = ctx.saved_tensors
        kept = probabilities, torch.ones_like(mine), column, weights
        return right(SimpleNamespace(saved_tensors=kept, dtype=ctx.dtype), gradient)

    plant(_VocabParallelCrossEntropy, "backward", staticmethod(wrong))


def shared_keys_and_values_not_summed() -> None:
    from models import attention
    from models.parallel.collectives import gather_from_group

    plant(attention, "all_gather", gather_from_group)


BOTH_WAYS, TOKENS = (TP2, PP2), (TP2, SEQUENCE)
BOTH = (0, 1)


# An element whose gradient is nearly zero moves for rounding alone: see `test_layouts.py`.
LARGER_EPS = "deepspeed.optimizer.params.eps=1e-7"


def _case(*overrides: str, stem: str = "zero1", family: str = "gpt2", ranks: int = 2) -> Case:
    return Case(stem, ranks, "fp32", family, overrides=(FEW_ROWS, TP2, *overrides))


def _more(stem: str, ranks: int, overrides: tuple[str, ...], sign: str) -> tuple[Any, ...]:
    """Both precisions."""
    return tuple((Case(stem, ranks, p, overrides=overrides), sign) for p in ("fp32", "bf16"))


LAST_OUT, GRADIENTS, BEFORE = r"blocks\.1\.mlp\.down", "parameter gradients", "weights before"
FIRST_OUT, TOKEN = r"blocks\.0\.attention\.out", r"embedding\.token"
OF_IN, OF_OUT, IN, OUT = (
    "gradient of its input", "gradient of its output", "its input", "its output",
)  # fmt: skip
FAULTS = [
    Seeded(
        backward_all_reduce_dropped, _case(), NORM_1, "backward", "output", OF_IN, ranks=BOTH,
        more=(
            *_more("zero1", 2, (TP2,), NORM_1)[1:],
            *_more("zero3", 4, (TP2,), NORM_1),
            *_more("zero1", 4, BOTH_WAYS, NORM_1),
        ),
    ),
    Seeded(
        row_parallel_sum_without_autograd, _case(stem="zero0"), NORM_1, "backward", LAST_OUT, OF_IN,
        ranks=BOTH, more=_more("zero0", 2, (TP2,), NORM_1)[1:],
    ),
    Seeded(
        row_parallel_sum_summed_on_the_way_back_too, _case(), NORM_1, "backward", LAST_OUT, OF_IN,
        ranks=BOTH, more=_more("zero2", 2, (TP2,), NORM_1),
    ),
    Seeded(row_parallel_sum_left_out, _case(), LOSS_1, "forward", FIRST_OUT, OUT, ranks=BOTH),
    Seeded(
        row_bias_added_on_every_rank, _case(), LOSS_2, "forward", FIRST_OUT, OUT, 2, BOTH,
        more=(*_more("zero1", 2, (TP2,), LOSS_2)[1:], *_more("zero1", 4, BOTH_WAYS, LOSS_2)),
    ),
    Seeded(embedding_not_summed, _case(), LOSS_1, "forward", TOKEN, OUT, ranks=BOTH),
    Seeded(embedding_shard_off_by_one_row, _case(), LOSS_1, "forward", TOKEN, OUT, ranks=BOTH),
    Seeded(residual_dropped_on_rank_1, _case(), LOSS_1, "forward", r"blocks\.0", OUT, ranks=(1,)),
    Seeded(
        shards_not_marked_for_the_norm, _case(), NORM_1, "grad norm", "grad norm", ranks=BOTH,
        more=(
            *_more("zero0", 2, (TP2,), NORM_1),
            *_more("zero1", 4, (TP2,), NORM_1),
            *_more("zero3", 2, (TP2,), NORM_1),
            *_more("zero1", 4, BOTH_WAYS, NORM_1),
        ),
    ),
    Seeded(
        copies_counted_on_each_rank_in_the_norm, _case(), NORM_1, "grad norm", "grad norm",
        ranks=BOTH,
    ),
    Seeded(shards_swapped, _case(), LOSS_1, BEFORE, rf"{TOKEN}\.weight", ranks=BOTH),
    Seeded(
        queries_keys_and_values_cut_as_one_matrix, _case(), LOSS_1, BEFORE,
        r"blocks\.0\.attention\.qkv\.weight", ranks=BOTH,
    ),
    Seeded(
        gate_and_up_cut_as_one_matrix, _case(LARGER_EPS, family="llama"), LOSS_1, BEFORE,
        r"blocks\.0\.mlp\.up\.weight", ranks=BOTH,
    ),
    Seeded(each_shard_drawn_by_itself, _case(), LOSS_1, BEFORE, rf"{TOKEN}\.weight", ranks=(1,)),
    Seeded(
        padding_counted_as_words, _case("model.vocab=321"), LOSS_1, "loss", "loss",
        "of a micro batch", ranks=BOTH,
    ),
    Seeded(
        each_rank_subtracts_its_own_largest_logit, _case(), LOSS_1, "loss", "loss",
        "of a micro batch", ranks=BOTH,
    ),
    Seeded(
        label_taken_away_on_every_rank, _case(), NORM_1, "backward", "output", OF_OUT, ranks=BOTH
    ),
    Seeded(
        shared_keys_and_values_not_summed, _case("model.kv_heads=1", family="llama"), NORM_1,
        "backward", r"blocks\.1\.attention\.qkv", OF_OUT, ranks=BOTH,
    ),
]  # fmt: skip
