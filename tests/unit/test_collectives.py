"""The collectives of tensor parallelism: forward and backward against one process's autograd."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from models.parallel import collectives
from models.parallel.cross_entropy import vocab_parallel_cross_entropy
from tests.collectives import Traffic
from tests.ranks import run_ranks
from tests.unit.tp_cases import apart, of_all_ranks, start

Call = Callable[[Tensor, int, dist.ProcessGroup | None], Tensor]


@dataclass(frozen=True)
class Op:
    """A collective, and what it is in one process: `whole` maps all ranks' tensors to all ranks'.

    Where the ranks share an input, they hold one tensor; where they share an output, they all have
    the same use for it, and that use counts once.
    """

    call: Call
    whole: Callable[[list[Tensor], int], list[Tensor]]
    shared_input: bool
    shared_output: bool


def total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


OPS = {
    "copy_to_group": Op(
        lambda x, dim, group: collectives.copy_to_group(x, group),
        lambda parts, dim: parts,
        shared_input=True, shared_output=False,
    ),
    "reduce_from_group": Op(
        lambda x, dim, group: collectives.reduce_from_group(x, group),
        lambda parts, dim: [total(parts)] * len(parts),
        shared_input=False, shared_output=True,
    ),
    "scatter_to_group": Op(
        collectives.scatter_to_group,
        lambda parts, dim: list(parts[0].chunk(len(parts), dim)),
        shared_input=True, shared_output=False,
    ),
    "gather_from_group": Op(
        collectives.gather_from_group,
        lambda parts, dim: [torch.cat(parts, dim)] * len(parts),
        shared_input=False, shared_output=True,
    ),
    "all_gather": Op(
        collectives.all_gather,
        lambda parts, dim: [torch.cat(parts, dim)] * len(parts),
        shared_input=False, shared_output=False,
    ),
    "reduce_scatter": Op(
        collectives.reduce_scatter,
        lambda parts, dim: list(total(parts).chunk(len(parts), dim)),
        shared_input=False, shared_output=False,
    ),
}  # fmt: skip


def small_integers(shape: torch.Size | list[int], seed: int) -> Tensor:
    """Numbers whose sums and products fp32 holds exactly, in whatever order they are taken."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, tuple(shape), generator=generator).float()


def check_op(op: Op, dim: int, group: dist.ProcessGroup, transposed: bool) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    shape = [4, 8, 12]
    inputs = [small_integers(shape, 0 if op.shared_input else r) for r in range(size)]
    if op.shared_input:
        inputs = [inputs[0]] * size
    leaves = {id(x): x.requires_grad_() for x in inputs}
    expected = op.whole(inputs, dim)
    slopes = [
        small_integers(expected[0].shape, 0 if op.shared_output else 9 + r) for r in range(size)
    ]
    # Squares, so that a gradient depends on the values too.
    losses = [(slope * y * y).sum() for slope, y in zip(slopes, expected, strict=True)]
    total(losses[:1] if op.shared_output else losses).backward()
    assert len(leaves) == (1 if op.shared_input else size)
    mine = inputs[rank].detach().clone()
    if transposed:  # the same numbers, laid out in another order
        mine = mine.transpose(0, 2).contiguous().transpose(0, 2)
    before = mine.clone()
    mine.requires_grad_()
    y = op.call(mine, dim, group)
    assert torch.equal(y, expected[rank])
    slope = slopes[rank]
    (slope * y * y).sum().backward()
    gradient = inputs[rank].grad
    assert mine.grad is not None and gradient is not None
    assert torch.equal(mine.grad, gradient)
    assert torch.equal(mine, before), "the input was changed in place"


def check_ops() -> None:
    group = start()
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    assert isinstance(alone, dist.ProcessGroup)
    for name, op in OPS.items():
        for dim in (0, 1, -1):
            for transposed in (False, True):
                try:
                    check_op(op, dim, group, transposed)
                except AssertionError as error:
                    error.add_note(f"{name}, dimension {dim}, transposed {transposed}")
                    raise
        x = torch.ones(3, 5, requires_grad=True)
        assert op.call(x, 0, None) is x and op.call(x, 0, alone) is x, name
    for name in ("scatter_to_group", "reduce_scatter"):
        with pytest.raises(
            ValueError, match=r"dimension 1 of \[4, 7\] is no multiple of the \d ra"
        ):
            OPS[name].call(torch.ones(4, 7), 1, group)


@pytest.mark.parametrize("ranks", [2, 4])
def test_collectives_equal_autograd_of_one_process(ranks: int) -> None:
    run_ranks(check_ops, ranks)


def check_cross_entropy(
    group: dist.ProcessGroup, vocab: int, scale: float, dtype: torch.dtype, weighted: bool
) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    width = -(-vocab // size)
    generator = torch.Generator().manual_seed(vocab)
    whole = (torch.randn(3, vocab, generator=generator) * scale).to(dtype)
    whole = torch.stack((whole, whole.flip(0)))  # [2, 3, vocab]
    labels = torch.randint(0, vocab, (2, 3), generator=generator)
    labels[0, 0], labels[1, 2] = 0, vocab - 1  # words at the edges of the first and last rank
    weights = torch.tensor([[0.0, 2.0, 1.0], [0.5, 0.0, 1.0]]) if weighted else None
    # What stands in columns that are no words must not matter, however large it is.
    padded = F.pad(whole, (0, width * size - vocab), value=1e6)
    mine = padded[..., rank * width : (rank + 1) * width].clone().requires_grad_()
    before = mine.detach().clone()
    loss = vocab_parallel_cross_entropy(mine, labels, weights, vocab, group)
    (3 * loss).backward()
    whole.requires_grad_()
    losses = F.cross_entropy(whole.float().flatten(0, 1), labels.flatten(), reduction="none")
    expected = (losses if weights is None else losses * weights.flatten()).sum()
    (3 * expected).backward()
    assert mine.grad is not None and whole.grad is not None
    assert torch.equal(mine, before)
    assert loss.dtype == torch.float32 and mine.grad.dtype == dtype
    assert loss.isfinite() and mine.grad.isfinite().all()
    assert all(torch.equal(loss.detach(), other) for other in of_all_ranks(loss))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    gradient = torch.cat(of_all_ranks(mine.grad), -1)
    assert not gradient[..., vocab:].any(), "a column that is no word has a gradient"
    # bf16: both round the same fp32 number, unless it lies on the edge between two.
    assert apart(gradient[..., :vocab], whole.grad) < (1e-6 if dtype == torch.float32 else 1e-3)


def check_cross_entropies() -> None:
    group = start()
    # 48: every rank has as many words; 97: the last has fewer; 9: on 4 ranks the last has none.
    for vocab in (48, 97, 9):
        for scale in (1.0, 1e4):
            for dtype in (torch.float32, torch.bfloat16):
                for weighted in (False, True):
                    try:
                        check_cross_entropy(group, vocab, scale, dtype, weighted)
                    except AssertionError as error:
                        error.add_note(f"vocab {vocab}, scale {scale}, {dtype}, {weighted}")
                        raise


@pytest.mark.parametrize("ranks", [2, 4])
def test_cross_entropy_equals_that_of_the_whole_logits(ranks: int) -> None:
    run_ranks(check_cross_entropies, ranks)


def cross_entropy_traffic() -> list[tuple[str, list[torch.Size]]]:
    group = start()
    labels = torch.zeros(2, 5, dtype=torch.long)
    mine = torch.randn(2, 5, 1000, requires_grad=True)
    traffic = Traffic()
    with traffic:
        vocab_parallel_cross_entropy(mine, labels, None, 1990, group).backward()
    return traffic.shapes


def test_cross_entropy_sends_three_numbers_a_token_and_no_logits() -> None:
    for seen in run_ranks(cross_entropy_traffic, 2):
        assert {name for name, _ in seen} == {"allreduce_"}
        assert sum(shape.numel() for _, shapes in seen for shape in shapes) == 3 * 2 * 5


def test_cross_entropy_on_one_rank_leaves_the_padding_out() -> None:
    logits = torch.zeros(2, 3, 8)
    logits[..., 6:] = 100.0
    labels = torch.zeros(2, 3, dtype=torch.long)
    found = vocab_parallel_cross_entropy(logits, labels, None, 6, None)
    assert found.item() == pytest.approx(6 * torch.tensor(6.0).log().item())
