from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from launch.config.layout import Layout
from launch.data.batches import Batches, document_positions, validation_set
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
        found = [batches.rank_batch(step, plan, rank) for rank in range(data)]
        rows = torch.stack([batch.tokens for batch in found])
        assert rows.shape == (data, accumulation, micro_batch, 4)
        assert rows.dtype == torch.int64
        # Each label is the token that follows, across the end of its row too.
        assert all(torch.equal(batch.labels, batch.tokens + 1) for batch in found)
        assert {batch.total_weight for batch in found} == {12.0 * 4}
        # In the order (micro step, rank, i) the rows are the global batch itself.
        starts = rows.transpose(0, 1)[..., 0].flatten() // 4
        assert starts.tolist() == batches.indices(step).tolist()
        assert torch.equal(rows - rows[..., :1], torch.arange(4).expand_as(rows))


def test_too_little_text_for_one_batch_is_rejected(numbers: TokenFile) -> None:
    Batches(numbers, 4, 11, seed=0)
    with pytest.raises(
        UserError, match=r"47 train tokens make 11 sequences of 4, fewer than .* 12"
    ):
        Batches(numbers, 4, 12, seed=0)


def mean_over_ranks(numbers: TokenFile, sequences: int, micro: int, size: int) -> float:
    shares = [validation_set(numbers, 4, sequences, micro, rank, size) for rank in range(size)]
    assert len({len(share.micro_batches) for share in shares}) == 1  # as many collectives
    (total,) = {share.total_weight for share in shares}
    losses = 0.0
    for batch in (batch for share in shares for batch in share.micro_batches):
        weights = (
            torch.ones(batch.tokens.shape) if batch.loss_weights is None else batch.loss_weights
        )
        losses += float((batch.labels.double() ** 2 * weights).sum())
    return losses / total


@pytest.mark.parametrize(("sequences", "counted"), [(1, 1), (7, 7), (8, 8), (11, 11), (99, 11)])
@pytest.mark.parametrize("micro", [1, 2, 4, 16])
def test_the_held_out_mean_is_the_same_for_any_ranks(
    numbers: TokenFile, sequences: int, counted: int, micro: int
) -> None:
    expected = float(np.mean(np.arange(1.0, 4 * counted + 1) ** 2))
    for size in (1, 2, 3, 4, 13):
        assert mean_over_ranks(numbers, sequences, micro, size) == pytest.approx(
            expected, rel=1e-12
        )


def test_held_out_rows_are_the_first_of_the_file(numbers: TokenFile) -> None:
    (batch,), weight = validation_set(numbers, 4, 2, 2)
    assert (batch.tokens.tolist(), weight) == ([[0, 1, 2, 3], [4, 5, 6, 7]], 8.0)
    assert batch.labels.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert batch.tokens.dtype == torch.int64


def test_too_little_held_out_text_is_rejected(numbers: TokenFile) -> None:
    with pytest.raises(UserError, match=r"data\.held_out: 47 held-out tokens"):
        validation_set(numbers, 47, 1, 1)


@pytest.mark.parametrize(
    ("data", "accumulation", "micro_batch"), [(1, 5, 2), (2, 5, 1), (5, 1, 2), (10, 1, 1)]
)
def test_loss_weights_go_with_their_rows_and_each_rank_knows_their_sum(
    numbers: TokenFile, data: int, accumulation: int, micro_batch: int
) -> None:
    sequences: list[int] = []

    def weights(step: int) -> npt.NDArray[np.float32]:
        """Each label's weight is 100 times the step and its own id, but for rows 3 and 4."""
        labels = np.array(sequences)[:, None] * 4 + np.arange(1, 5) + 100.0 * step
        labels[3:5] = 0.0
        return labels.astype(np.float32)

    batches = Batches(numbers, 4, 10, seed=3, weights=weights)
    plan = layout(data, accumulation, micro_batch)
    for step in (0, 2):
        sequences[:] = batches.indices(step).tolist()
        found = [batches.rank_batch(step, plan, rank) for rank in range(data)]
        seen = 0.0
        for batch in found:
            assert batch.loss_weights is not None
            for micro in batch.micro_batches():
                assert micro.loss_weights is not None
                counted = micro.loss_weights > 0
                expected = micro.labels.float() + 100 * step
                assert torch.equal(micro.loss_weights[counted], expected[counted])
                seen += float(micro.loss_weights.sum())
        assert {batch.total_weight for batch in found} == {seen} == {float(weights(step).sum())}


def test_a_step_in_which_no_label_counts_is_an_error(numbers: TokenFile) -> None:
    batches = Batches(numbers, 4, 4, 7, weights=lambda step: np.zeros((4, 4), dtype=np.float32))
    with pytest.raises(UserError, match="no label of step 3 counts"):
        batches.rank_batch(2, layout(1, 1, 4), 0)


def test_positions_count_from_each_separator() -> None:
    rows = torch.tensor([[5, 6, 9, 7, 8, 8], [9, 9, 1, 2, 3, 9], [1, 2, 3, 4, 5, 6]])
    assert document_positions(rows, 9).tolist() == [
        [0, 1, 0, 1, 2, 3], [0, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5],
    ]  # fmt: skip
