"""A whole GPT over tensor ranks computes what it computes on one, whatever its family."""

import pytest
import torch
from torch import Tensor

from models.gpt import GPT
from models.init_weights import initialize
from models.parallel.tensor_parallel import Shard
from tests.collectives import Traffic
from tests.ranks import run_ranks
from tests.selection import representatives
from tests.unit.tp_cases import (
    FAMILIES,
    LLAMA,
    Distances,
    gpt_apart,
    load,
    make_tp,
    of_all_ranks,
    reference_gpt,
    start,
    tokens_and_labels,
)

BOUND = 2e-6  # of fp32: sums are taken in another order
SEQUENCE_PARALLEL = (False, True)


def family_apart(family: str) -> dict[tuple[bool, bool], Distances]:
    start()
    config = FAMILIES[family]
    return {
        (sequence_parallel, checkpointed): gpt_apart(
            config, make_tp(config, sequence_parallel), checkpointed
        )
        for sequence_parallel in SEQUENCE_PARALLEL
        for checkpointed in (False, True)
    }


@pytest.mark.parametrize(
    ("family", "ranks"),
    representatives(
        [pytest.param(family, ranks) for ranks in (4, 2) for family in FAMILIES],
        lambda *case: case,
        cost=lambda _, ranks: ranks,
    ),
)
def test_loss_logits_and_gradients_equal_those_of_one_rank(family: str, ranks: int) -> None:
    for results in run_ranks(family_apart, ranks, family):
        for layout, found in results.items():
            assert {name: d for name, d in found.items() if d > BOUND} == {}, layout
            copies = {name: d for name, d in found.items() if name.startswith("copies of")}
            assert copies and not any(copies.values()), layout
        # A block computed again gives the same bits.
        for sequence_parallel in SEQUENCE_PARALLEL:
            assert results[sequence_parallel, False] == results[sequence_parallel, True]


def widths_sent(sequence_parallel: bool) -> tuple[set[int], set[int]]:
    """The last dimensions of all that is sent in a step, and for the logits."""
    start()
    model = GPT(LLAMA, tp=make_tp(LLAMA, sequence_parallel))
    load(model, reference_gpt(LLAMA))
    tokens, labels = tokens_and_labels(LLAMA.vocab)
    with Traffic() as step:
        model(tokens, labels).backward()
    with Traffic() as logits, torch.no_grad():
        model(tokens)
    in_step, in_logits = (
        {shape[-1] for _, shapes in traffic.shapes for shape in shapes if shape}
        for traffic in (step, logits)
    )
    return in_step, in_logits


@pytest.mark.parametrize("sequence_parallel", SEQUENCE_PARALLEL)
def test_a_step_sends_no_logits(sequence_parallel: bool) -> None:
    of_vocabulary = {LLAMA.vocab, LLAMA.vocab + 1, (LLAMA.vocab + 1) // 2}
    for in_step, in_logits in run_ranks(widths_sent, 2, sequence_parallel):
        assert LLAMA.hidden in in_step and not in_step & of_vocabulary
        assert in_logits & of_vocabulary  # where the logits are asked for, they are gathered


def first_weights() -> dict[str, bool]:
    """Of each parameter: do the ranks' parts make up the one that is drawn on one rank?"""
    start()
    same = {}
    for config in FAMILIES.values():
        whole, model = GPT(config), GPT(config, tp=make_tp(config))
        initialize(whole, 4)
        initialize(model, 4)
        for (name, expected), (_, found) in zip(
            whole.named_parameters(), model.named_parameters(), strict=True
        ):
            shard: Shard | None = getattr(found, "shard", None)
            merged = shard.merge(of_all_ranks(found)) if shard else found
            same[name] = torch.equal(merged, expected)
    return same


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_draw_their_parts_of_the_first_weights_of_one(ranks: int) -> None:
    for same in run_ranks(first_weights, ranks):
        assert same and all(same.values()), same


def outputs_on_ranks() -> tuple[Tensor, Tensor]:
    start()
    model = GPT(LLAMA, tp=make_tp(LLAMA))
    load(model, reference_gpt(LLAMA))
    tokens, labels = tokens_and_labels(LLAMA.vocab)
    with torch.no_grad():
        return model(tokens), model(tokens, labels)


def test_every_rank_has_the_same_whole_logits_and_loss() -> None:
    (logits, loss), (other_logits, other_loss) = run_ranks(outputs_on_ranks, 2)
    assert logits.shape[-1] == LLAMA.vocab
    assert torch.equal(logits, other_logits) and torch.equal(loss, other_loss)
