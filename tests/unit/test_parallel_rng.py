"""Dropout over tensor ranks: where masks are the same, where they differ, and that they come again."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models import attention, gpt
from models.gpt import GPT
from models.parallel import rng
from models.parallel.rng import dropout, fork_rng_per_rank
from tests.ranks import run_ranks
from tests.unit.tp_cases import (
    GPT2,
    load,
    make_tp,
    of_all_ranks,
    reference_gpt,
    start,
    tokens_and_labels,
)

DROPOUT = 0.4
RANKS = 4
CPU = torch.device("cpu")


def distinct(x: Tensor) -> int:
    """How many ranks' tensors there are that no other rank has."""
    return len({tuple(part.flatten().tolist()) for part in of_all_ranks(x)})


def shared_and_own_masks() -> None:
    group, size = start(), dist.get_world_size()
    ones = torch.ones(100, 50)
    torch.manual_seed(1)
    shared, own, again = (dropout(ones, DROPOUT, True, over) for over in (None, group, group))
    after = torch.rand(8)
    assert distinct(shared) == 1
    assert distinct(own) == distinct(again) == size
    assert not torch.equal(own, again), "the next region has the same mask"
    assert not torch.equal(own, shared)
    assert distinct(after) == 1, "the ranks have parted"
    for x in (shared, own):
        assert set(x.unique().tolist()) == {0.0, ones.new_tensor(1 / (1 - DROPOUT)).item()}
        assert (x == 0).float().mean().item() == pytest.approx(DROPOUT, abs=0.05)
    # Masks follow from where the shared generator is.
    torch.manual_seed(1)
    assert torch.equal(dropout(ones, DROPOUT, True), shared)
    assert torch.equal(dropout(ones, DROPOUT, True, group), own)
    torch.manual_seed(2)
    dropout(ones, DROPOUT, True)
    assert not torch.equal(dropout(ones, DROPOUT, True, group), own)


def test_masks_are_shared_or_own_as_asked() -> None:
    run_ranks(shared_and_own_masks, RANKS)


def where_the_generator_is() -> None:
    group = start()
    torch.manual_seed(1)
    torch.rand(1)
    expected = torch.rand(4)
    for draws in (0, 1, 1000):  # what is drawn within does not matter
        torch.manual_seed(1)
        with fork_rng_per_rank(group, CPU):
            torch.rand(draws)
        assert torch.equal(torch.rand(4), expected), draws
    torch.manual_seed(1)
    with pytest.raises(ZeroDivisionError), fork_rng_per_rank(group, CPU):
        raise ZeroDivisionError  # as torch's checkpoint leaves a block, once it has what it needs
    assert torch.equal(torch.rand(4), expected)
    # Nothing is drawn where there is nothing to drop, and on one rank the region is no region.
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    torch.manual_seed(1)
    first = torch.rand(4)
    torch.manual_seed(1)
    ones = torch.ones(3)
    assert dropout(ones, 0.0, True, group) is ones and dropout(ones, 0.5, False, group) is ones
    for nobody in (None, alone):
        with fork_rng_per_rank(nobody, CPU):
            pass
    assert torch.equal(torch.rand(4), first)


def test_the_shared_generator_goes_on_alike_whatever_is_drawn_within() -> None:
    run_ranks(where_the_generator_is, 2)


def new_gpt(sequence_parallel: bool, checkpoint_activations: bool = False) -> GPT:
    config = replace(GPT2, dropout=DROPOUT)
    model = GPT(config, checkpoint_activations, make_tp(config, sequence_parallel))
    load(model, reference_gpt(config))
    return model.train()


def masks_in_a_block(sequence_parallel: bool) -> dict[str, int]:
    """How many different masks the ranks have: after the embedding, in attention, after it."""
    start()
    model = new_gpt(sequence_parallel)
    block = model.blocks[0]
    assert isinstance(block, gpt.Block)
    seen: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, given: seen.update({name: given[0].detach()}))

    note("block", block)
    note("out", block.attention.out)
    note("mlp_norm", block.mlp_norm)
    with torch.no_grad():
        # All words and positions alike; queries and keys 0, so that every weight is 1 / tokens
        # seen; values 1; and attention's output 1. What is left is masks.
        for parameter in (*block.attention.parameters(), *model.embedding.parameters()):
            parameter.zero_()
        assert block.attention.qkv.bias is not None and block.attention.out.bias is not None
        block.attention.qkv.bias[-block.attention.widths[-1] :] = 1.0
        block.attention.out.bias.fill_(1.0)
        model.embedding.token.weight.fill_(1.0)
    torch.manual_seed(1)
    tokens, _ = tokens_and_labels(GPT2.vocab)
    model(tokens)
    return {
        "embedding": distinct(seen["block"]),
        "attention": distinct(seen["out"]),
        "residual": distinct(seen["mlp_norm"] - seen["block"]),
    }


def test_a_blocks_masks_are_shared_where_its_activations_are() -> None:
    found = run_ranks(masks_in_a_block, RANKS, False)[0]
    assert found == {"embedding": 1, "attention": RANKS, "residual": 1}
    # Each rank has tokens of its own then. The embedding's mask is drawn for all and cut.
    found = run_ranks(masks_in_a_block, RANKS, True)[0]
    assert found == {"embedding": RANKS, "attention": RANKS, "residual": RANKS}


def recomputation_is_the_same(fault: str = "") -> dict[tuple[bool, str], bool]:
    """Of each gradient, with sequence parallelism and without: is it the same if blocks run twice?"""
    start()
    tokens, labels = tokens_and_labels(GPT2.vocab)
    same = {}
    for sequence_parallel in (False, True):
        found = []
        for checkpointed in (False, True):
            model = new_gpt(sequence_parallel, checkpointed)
            torch.manual_seed(1)
            with FAULTS[fault]():
                loss = model(tokens, labels)
                loss.backward()
            grads = {name: p.grad for name, p in model.named_parameters()}
            found.append({"loss": loss.detach(), "after": torch.rand(8), **grads})
        for name, tensor in found[0].items():
            other = found[1][name]
            assert tensor is not None and other is not None
            same[sequence_parallel, name] = torch.equal(tensor, other)
    return same


def unsaved_generator() -> AbstractContextManager[object]:
    """A second generator by rank, which nobody puts back when a block runs again."""
    states: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def own(group: dist.ProcessGroup | None, device: torch.device) -> Iterator[None]:
        shared = torch.get_rng_state()
        torch.manual_seed(100 + dist.get_rank())
        torch.set_rng_state(states.get("own", torch.get_rng_state()))
        yield
        states["own"] = torch.get_rng_state()
        torch.set_rng_state(shared)

    return mock.patch.object(attention, "fork_rng_per_rank", own)


def one_mask_for_all() -> AbstractContextManager[object]:
    """Every rank draws from the shared generator."""
    stack = contextlib.ExitStack()
    for module in (attention, rng):
        stack.enter_context(
            mock.patch.object(module, "fork_rng_per_rank", lambda group, device: nullcontext())
        )
    return stack


FAULTS = {"": nullcontext, "unsaved generator": unsaved_generator}


@pytest.mark.parametrize("ranks", [2, RANKS])
def test_recomputation_draws_the_same_masks(ranks: int) -> None:
    for same in run_ranks(recomputation_is_the_same, ranks):
        assert [name for name, equal in same.items() if not equal] == []


def test_a_generator_that_is_not_put_back_is_noticed() -> None:
    for same in run_ranks(recomputation_is_the_same, 2, "unsaved generator"):
        assert same[False, "loss"] and not same[False, "blocks.0.attention.qkv.weight"]


def masks_with_one_generator() -> dict[str, int]:
    with one_mask_for_all():
        return masks_in_a_block(True)


def test_the_same_mask_on_all_parts_is_noticed() -> None:
    found = run_ranks(masks_with_one_generator, RANKS)[0]
    assert found["attention"] == found["residual"] == 1
