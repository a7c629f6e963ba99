"""Mistakes that are copied from place to place, made on purpose: the comparisons see each of them.

None of them raises anything, and most leave the loss and the logits as they are.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from models import attention, gpt, norms
from models.parallel import collectives, tensor_parallel
from models.parallel.collectives import reduce_from_group
from models.parallel.cross_entropy import vocab_parallel_cross_entropy
from models.parallel.tensor_parallel import RowParallelLinear, Shard
from tests.ranks import run_ranks
from tests.unit.tp_cases import (
    FAMILIES,
    Distances,
    apart,
    column_apart,
    gpt_apart,
    load,
    make_tp,
    reference_gpt,
    row_apart,
    start,
    tokens_and_labels,
)

RANKS = 4
RIGHT, WRONG = 2e-6, 1e-3  # at most, and at least: relative to the tensor's norm
Fault = Callable[[], AbstractContextManager[object]]


def detached_all_reduce(x: Tensor, group: collectives.Group) -> Tensor:
    """The sum is right, and autograd does not know where it came from."""
    summed = x.detach().clone()
    dist.all_reduce(summed, group=group)
    return summed


def summed_twice(x: Tensor, group: collectives.Group) -> Tensor:
    """The backward takes the ranks' gradients for parts of a sum, and each has the whole."""
    return collectives.copy_to_group(collectives.reduce_from_group(x, group), group)


def in_place_all_reduce(x: Tensor, group: collectives.Group) -> Tensor:
    """What tutorials write: the sum is put where autograd may have kept the summand."""
    dist.all_reduce(x, group=group)
    return x


def not_summed(x: Tensor, group: collectives.Group) -> Tensor:
    return x


def gather_without_sum(x: Tensor, dim: int, group: collectives.Group) -> Tensor:
    """A gather whose backward takes this rank's part, where it has to sum over the ranks first."""
    return collectives.gather_from_group(x, dim, group)


def cut_as_one(parts: int) -> AbstractContextManager[object]:
    """A matrix of so many parts is cut like any other.

    Rank 0 of 2 then has the queries and half of the keys, and `chunk(qkv, 3)` takes them for
    queries, keys and values.
    """
    by_parts = Shard.cut

    def cut(self: Shard, whole: Tensor) -> Tensor:
        if len(self.parts) == parts:
            return whole.chunk(self.size, self.dim)[self.rank]
        return by_parts(self, whole)

    return mock.patch.object(Shard, "cut", cut)


def bias_everywhere(self: RowParallelLinear, x: Tensor) -> Tensor:
    return reduce_from_group(F.linear(x, self.weight, self.bias), self.group)


def no_mask() -> AbstractContextManager[object]:
    """Each token attends to those that it has to predict."""
    attend: Any = F.scaled_dot_product_attention

    def attend_to_all(*args: Tensor, **kwargs: Any) -> Tensor:
        mixed: Tensor = attend(*args, **{**kwargs, "is_causal": False})
        return mixed

    return mock.patch.object(F, "scaled_dot_product_attention", attend_to_all)


def words_of_padding(
    logits: Tensor, labels: Tensor, weights: Tensor | None, vocab: int, group: collectives.Group
) -> Tensor:
    """Columns that pad the vocabulary are words like others."""
    width = logits.shape[-1] * collectives.group_size(group)
    return vocab_parallel_cross_entropy(logits, labels, weights, width, group)


@dataclass(frozen=True)
class Seeded:
    """A fault in a GPT: what it does, where it is seen, and what it leaves as it was."""

    fault: Fault
    seen: tuple[str, ...]
    unseen: tuple[str, ...] = ()
    family: str = "gpt2"
    sequence_parallel: bool = False


ATTENTION, MLP = "blocks.0.attention", "blocks.0.mlp"
OUTPUTS = ("loss", "logits")
SEEDED = {
    "row-parallel all-reduce without autograd": Seeded(
        lambda: mock.patch.object(tensor_parallel, "reduce_from_group", detached_all_reduce),
        seen=(f"{ATTENTION}.qkv.weight", f"{MLP}.down.weight"),
        unseen=OUTPUTS,
    ),
    "row-parallel all-reduce summed on the way back too": Seeded(
        lambda: mock.patch.object(tensor_parallel, "reduce_from_group", summed_twice),
        seen=(f"{ATTENTION}.qkv.weight", f"{MLP}.down.weight"),
        unseen=OUTPUTS,
    ),
    "column-parallel input not summed on the way back": Seeded(
        lambda: mock.patch.object(tensor_parallel, "copy_to_group", not_summed),
        seen=("blocks.0.attention_norm.weight", "copies of blocks.0.attention_norm.weight",
              f"{ATTENTION}.qkv.weight"),
        unseen=OUTPUTS,
    ),
    "both, as in the tutorials": Seeded(
        lambda: mock.patch.multiple(
            tensor_parallel, copy_to_group=not_summed, reduce_from_group=in_place_all_reduce
        ),
        seen=("blocks.0.attention_norm.weight", "copies of blocks.0.attention_norm.weight"),
        unseen=OUTPUTS,
    ),
    "qkv cut as one matrix": Seeded(
        lambda: cut_as_one(3),
        seen=(*OUTPUTS, f"{ATTENTION}.qkv.weight"),
    ),
    "gate and up cut as one matrix": Seeded(
        lambda: cut_as_one(2),
        seen=(*OUTPUTS, f"{MLP}.up.weight"),
        family="llama",
    ),
    "no causal mask": Seeded(
        no_mask,
        seen=(*OUTPUTS, f"{ATTENTION}.qkv.weight"),
    ),
    "row bias on every rank": Seeded(
        lambda: mock.patch.object(RowParallelLinear, "forward", bias_everywhere),
        seen=OUTPUTS,
    ),
    "sequence-parallel norms not summed": Seeded(
        lambda: mock.patch.object(norms, "copy_to_group", not_summed),
        seen=("norm.weight", "norm.bias", "blocks.0.mlp_norm.bias", "copies of norm.weight"),
        unseen=(*OUTPUTS, f"{ATTENTION}.qkv.weight"),
        sequence_parallel=True,
    ),
    "sequence-parallel row bias not summed": Seeded(
        lambda: mock.patch.object(tensor_parallel, "copy_to_group", not_summed),
        seen=(f"{ATTENTION}.out.bias", f"copies of {MLP}.down.bias"),
        unseen=(*OUTPUTS, f"{MLP}.down.weight"),
        sequence_parallel=True,
    ),
    "sequence-parallel gather without a sum": Seeded(
        lambda: mock.patch.object(tensor_parallel, "all_gather", gather_without_sum),
        seen=("norm.weight", f"{ATTENTION}.qkv.weight"),
        unseen=OUTPUTS,
        sequence_parallel=True,
    ),
    "norms of heads not summed": Seeded(
        lambda: mock.patch.object(norms, "copy_to_group", not_summed),
        seen=(f"{ATTENTION}.query_norm.weight", f"copies of {ATTENTION}.key_norm.weight"),
        unseen=(*OUTPUTS, f"{ATTENTION}.qkv.weight"),
        family="qwen3",
    ),
    "shared keys and values not summed": Seeded(
        lambda: mock.patch.object(attention, "all_gather", gather_without_sum),
        seen=(f"{ATTENTION}.qkv.weight",),
        unseen=(*OUTPUTS, "blocks.1.mlp.down.weight"),
        family="one key/value head",
    ),
    "padding counted as words": Seeded(
        lambda: mock.patch.object(gpt, "vocab_parallel_cross_entropy", words_of_padding),
        seen=("loss", "embedding.token.weight"),
        unseen=("logits",),
    ),
}  # fmt: skip


def seeded_apart() -> dict[str, tuple[Distances, Distances]]:
    """Distances with each fault, and without it in the same layout."""
    start()
    found = {}
    right: dict[tuple[str, bool], Distances] = {}
    for name, seeded in SEEDED.items():
        config = FAMILIES[seeded.family]
        tp = make_tp(config, seeded.sequence_parallel)
        wrong = gpt_apart(config, tp, fault=seeded.fault())
        layout = seeded.family, seeded.sequence_parallel
        if layout not in right:
            right[layout] = gpt_apart(config, tp, fault=nullcontext())
        found[name] = wrong, right[layout]
    return found


@pytest.fixture(scope="module")
def all_distances() -> list[dict[str, tuple[Distances, Distances]]]:
    return run_ranks(seeded_apart, RANKS)


@pytest.mark.parametrize("name", SEEDED)
def test_a_fault_in_a_gpt_is_seen(
    name: str, all_distances: list[dict[str, tuple[Distances, Distances]]]
) -> None:
    seeded = SEEDED[name]
    for tensor in seeded.seen:  # on some rank: with copies that differ, one of them may be right
        assert max(ranks[name][0][tensor] for ranks in all_distances) > WRONG, tensor
    for ranks in all_distances:
        wrong, right = ranks[name]
        assert {tensor: wrong[tensor] for tensor in seeded.unseen if wrong[tensor] > RIGHT} == {}
        assert max(right.values()) < RIGHT


def layers_apart() -> dict[str, Distances]:
    """Layers by themselves, with faults."""
    group = start()
    found = {}
    with mock.patch.object(tensor_parallel, "copy_to_group", not_summed):
        found["column"] = column_apart(group, [16])
    with mock.patch.object(tensor_parallel, "reduce_from_group", detached_all_reduce):
        found["row"] = row_apart(group)
    with mock.patch.object(RowParallelLinear, "forward", bias_everywhere):
        found["bias"] = row_apart(group)
    return found


def test_faults_in_layers_are_seen() -> None:
    for found in run_ranks(layers_apart, 2):
        wrong = {
            name: {tensor for tensor, distance in distances.items() if distance > WRONG}
            for name, distances in found.items()
        }
        # Its own weights get what they should: only what lies below learns something else.
        assert wrong["column"] == {"input"}
        assert wrong["row"] == {"input", "weight"}
        assert wrong["bias"] == {"output"}


def reduced_in_place() -> tuple[float, float]:
    """A sum over ranks of what autograd has kept for its backward pass: in place, and as it should."""
    group = start()
    distances = []
    for reduce in (in_place_all_reduce, reduce_from_group):
        x = torch.linspace(0, 1, 8, requires_grad=True)
        odds = x.exp()  # whose gradient is itself
        expected = odds.detach().clone()
        reduce(odds, group).sum().backward()
        assert x.grad is not None
        distances.append(apart(x.grad, expected))
    return distances[0], distances[1]


def test_an_all_reduce_in_place_spoils_what_autograd_has_kept() -> None:
    """After a linear layer, which keeps its input alone, it is right by luck."""
    for in_place, as_it_should in run_ranks(reduced_in_place, 2):
        assert in_place > 0.5 and as_it_should == 0.0


def leak(fault: Fault) -> float:
    """How far the first tokens' logits move with the words that come after them."""
    config = FAMILIES["gpt2"]
    tokens, _ = tokens_and_labels(config.vocab)
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % config.vocab
    model = gpt.GPT(config, tp=make_tp(config))
    load(model, reference_gpt(config))
    with fault(), torch.no_grad():
        return apart(model(changed)[:, :4], model(tokens)[:, :4])


def leaks() -> tuple[float, float]:
    start()
    return leak(no_mask), leak(nullcontext)


def test_without_a_mask_tokens_see_their_future() -> None:
    for wrong, right in run_ranks(leaks, 2):
        assert wrong > WRONG and right == 0.0
