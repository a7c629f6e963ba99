from pathlib import Path

import numpy as np
import pytest
import torch

from launch.config.layout import Layout
from launch.data.batches import Batches, held_out_share
from launch.data.token_file import TokenFile
from launch.errors import UserError
from models.parallel.grid import Grid


@pytest.fixture
def numbers(tmp_path: Path) -> TokenFile:
    """The tokens 0, 1, 2, ...: enough for 11 sequences of 4."""
    path = tmp_path / "numbers.bin"
    np.arange(47, dtype=np.uint16).tofile(path)
    return TokenFile(path, "uint16")


def layout(data: int, accumulation: int, micro_batch: int) -> Layout:
    return Layout(Grid(data=data), micro_batch, accumulation)


def test_each_epoch_holds_each_sequence_once_in_a_new_order(numbers: TokenFile) -> None:
    batches = Batches(numbers, 4, 4, seed=7)
    stream = np.concatenate([batches.indices(step) for step in range(11)]).reshape(4, 11)
    assert all(sorted(epoch) == list(range(11)) for epoch in stream.tolist())
    assert len({tuple(epoch) for epoch in stream.tolist()}) == 4
    assert stream[0].tolist() != list(range(11))


def test_a_step_is_a_function_of_seed_and_step(numbers: TokenFile) -> None:
    forward = [Batches(numbers, 4, 4, seed=7).indices(step).tolist() for step in range(9)]
    batches = Batches(numbers, 4, 4, seed=7)
    assert [batches.indices(step).tolist() for step in reversed(range(9))] == forward[::-1]
    assert Batches(numbers, 4, 4, seed=8).indices(0).tolist() != forward[0]
    whole = Batches(numbers, 4, 11, seed=7).indices(0).tolist()
    assert whole == [i for batch in forward for i in batch][:11]


@pytest.mark.parametrize(
    ("data", "accumulation", "micro_batch"),
    [(1, 1, 12), (1, 12, 1), (2, 3, 2), (4, 1, 3), (4, 3, 1), (3, 2, 2), (12, 1, 1)],
)
def test_ranks_and_micro_steps_divide_the_global_batch(
    tmp_path: Path, data: int, accumulation: int, micro_batch: int
) -> None:
    path = tmp_path / "many.bin"
    np.arange(4 * 20 + 1, dtype=np.uint16).tofile(path)
    batches = Batches(TokenFile(path, "uint16"), 4, 12, seed=3)
    plan = layout(data, accumulation, micro_batch)
    for step in (0, 1, 5):  # step 1 straddles two epochs of 20
        rows = torch.stack([batches.rank_batch(step, plan, rank) for rank in range(data)])
        assert rows.shape == (data, accumulation, micro_batch, 5)
        assert rows.dtype == torch.int64
        # In the order (micro step, rank, i) the rows are the global batch itself.
        starts = rows.transpose(0, 1)[..., 0].flatten() // 4
        assert starts.tolist() == batches.indices(step).tolist()
        assert torch.equal(rows - rows[..., :1], torch.arange(5).expand_as(rows))


def test_too_little_text_for_one_batch_is_refused(numbers: TokenFile) -> None:
    Batches(numbers, 4, 11, seed=0)
    with pytest.raises(
        UserError, match=r"47 train tokens make 11 sequences of 4, fewer than .* 12"
    ):
        Batches(numbers, 4, 12, seed=0)


def mean_over_ranks(numbers: TokenFile, sequences: int, micro: int, size: int) -> float:
    shares = [held_out_share(numbers, 4, sequences, micro, rank, size) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1  # the same number of collectives
    pairs = [pair for share in shares for pair in share]
    losses = (float((rows[:, 0].double() ** 2).mean()) * weight for rows, weight in pairs)
    return sum(losses) / sum(weight for _, weight in pairs)


@pytest.mark.parametrize(("sequences", "counted"), [(1, 1), (7, 7), (8, 8), (11, 11), (99, 11)])
@pytest.mark.parametrize("micro", [1, 2, 4, 16])
def test_the_held_out_mean_is_the_same_for_any_ranks(
    numbers: TokenFile, sequences: int, counted: int, micro: int
) -> None:
    expected = float(np.mean([(4.0 * i) ** 2 for i in range(counted)]))
    for size in (1, 2, 3, 4, 13):
        assert mean_over_ranks(numbers, sequences, micro, size) == pytest.approx(
            expected, rel=1e-12
        )


def test_held_out_rows_are_the_first_of_the_file(numbers: TokenFile) -> None:
    ((rows, weight),) = held_out_share(numbers, 4, 2, 2)
    assert (rows.tolist(), weight) == ([[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]], 2)
    assert rows.dtype == torch.int64


def test_too_little_held_out_text_is_refused(numbers: TokenFile) -> None:
    with pytest.raises(UserError, match=r"data\.held_out: 47 held-out tokens"):
        held_out_share(numbers, 47, 1, 1)
