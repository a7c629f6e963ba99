"""Tokens to batches, as a function of (seed, step) alone."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from launch.config.layout import Layout
from launch.config.schema import Recipe
from launch.data.prepare import Corpus, prepare, tokens_needed
from launch.data.token_file import TokenFile
from launch.errors import UserError

if TYPE_CHECKING:
    import torch


class Batches:
    """The global batch of each step: epochs of all train sequences, each in a new order.

    Which sequences make up step s depends on (seed, s) alone: not on the ranks, nor on what was read
    before, so that a resumed run needs its step and nothing else. A batch may straddle two epochs.
    The order is numpy's: another numpy release may give another one.

    Raises:
        UserError: where the text does not fill one global batch.
    """

    def __init__(
        self, tokens: TokenFile, sequence_length: int, global_batch_size: int, seed: int
    ) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.sequences = tokens.sequences(sequence_length)
        self._epoch: tuple[int, npt.NDArray[np.int64]] | None = None
        if self.sequences < global_batch_size:
            raise UserError(
                f"data.source: {len(tokens):,} train tokens make {max(self.sequences, 0)} sequences "
                f"of {sequence_length}, fewer than one global batch of {global_batch_size}: give "
                "more text, or lower train.global_batch_size or data.sequence_length"
            )

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """The sequences of a step, counted from 0: shape [global_batch_size]."""
        first = step * self.global_batch_size
        epochs, places = np.divmod(np.arange(first, first + self.global_batch_size), self.sequences)
        rows = [self._order(int(e))[places[epochs == e]] for e in np.unique(epochs)]
        return np.concatenate(rows)

    def rank_batch(self, step: int, layout: Layout, data_rank: int) -> "torch.Tensor":
        """What one data parallel rank gets of a step.

        Over ranks and micro steps, each row of the global batch comes once: row
        (micro step * data + data_rank) * micro_batch + i.

        Returns:
            int64 ids of shape [accumulation, micro_batch, sequence_length + 1].
        """
        shape = (layout.accumulation, layout.grid["data"], layout.micro_batch)
        mine = self.indices(step).reshape(shape)[:, data_rank]
        rows = _rows(self.tokens, mine.ravel().tolist(), self.sequence_length)
        return rows.view(layout.accumulation, layout.micro_batch, -1)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.sequences)
            self._epoch = (epoch, order)
        return self._epoch[1]


def load_batches(recipe: Recipe, say: Callable[[str], None] = print) -> tuple[Corpus, Batches]:
    """A recipe's tokenised source, and the batches that its steps take from it.

    Args:
        recipe: its `data` and `train` blocks decide both.
        say: receives a line where there is something to tell.

    Raises:
        UserError: as `prepare` and `Batches`.
    """
    corpus = prepare(recipe.data, tokens_needed=tokens_needed(recipe), say=say)
    train = recipe.train
    batches = Batches(
        corpus.train, recipe.data.sequence_length, train.global_batch_size, train.seed
    )
    return corpus, batches


def held_out_share(
    tokens: TokenFile,
    sequence_length: int,
    sequences: int,
    micro_batch: int,
    data_rank: int = 0,
    data_size: int = 1,
) -> list[tuple["torch.Tensor", int]]:
    """One rank's micro batches of the fixed held-out set: the file's first `sequences` sequences.

    The micro batches are the same for every number of ranks; rank r takes r, r + data_size, ... and
    all ranks get equally many, because under ZeRO-3 each forward pass is a collective: where they do
    not divide, some ranks repeat one with weight 0. With a model that returns the mean loss of a
    micro batch, the held-out loss is, summed over a rank's list and then over all ranks,

        sum(weight * loss) / sum(weight)

    Returns:
        (int64 ids of shape [up to micro_batch, sequence_length + 1], weight) pairs; the weight is
        the number of sequences that count. Only the last micro batch of a short file is smaller.

    Raises:
        UserError: where the held-out text does not fill one sequence.
    """
    count = min(sequences, tokens.sequences(sequence_length))
    if count < 1:
        raise UserError(
            f"data.held_out: {len(tokens):,} held-out tokens do not fill one sequence of "
            f"{sequence_length}: raise data.held_out, lower data.sequence_length, or give more text"
        )
    pieces = [range(i, min(i + micro_batch, count)) for i in range(0, count, micro_batch)]
    share = []
    for first in range(0, len(pieces), data_size):
        index = first + data_rank
        piece = pieces[index] if index < len(pieces) else pieces[0]
        weight = len(piece) if index < len(pieces) else 0
        share.append((_rows(tokens, piece, sequence_length), weight))
    return share


def _rows(tokens: TokenFile, indices: Iterable[int], sequence_length: int) -> "torch.Tensor":
    import torch

    return torch.from_numpy(np.stack([tokens.read(i, sequence_length) for i in indices]))
