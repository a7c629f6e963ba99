"""Tokens to batches, as a function of (seed, step) alone."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from launch.config.layout import Layout
from launch.config.schema import Recipe
from launch.data.batch import Batch, MicroBatch, ValidationSet
from launch.data.prepare import Corpus, prepare, tokens_needed
from launch.data.token_file import TokenFile
from launch.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Weights = Callable[[int], npt.NDArray[np.float32]]


class Batches:
    """The global batch of each step: epochs of all train sequences, each in a new order.

    Which sequences make up step s depends on (seed, s) alone: not on the ranks, nor on what was read
    before, so that a resumed run needs its step and nothing else. A batch may straddle two epochs.
    The order is numpy's: another numpy release may give another one.

    Args:
        tokens: the train tokens.
        sequence_length: tokens in a row.
        global_batch_size: rows in a step.
        seed: of the order.
        separator: the token between documents, where rows are to be divided into documents; None:
            each row is one document.
        weights: a step's loss weights `[global_batch_size, sequence_length]`, as a function of the
            step alone, so that each rank knows their sum; None: each label counts once.

    Raises:
        UserError: where the text does not fill one global batch.
    """

    def __init__(
        self,
        tokens: TokenFile,
        sequence_length: int,
        global_batch_size: int,
        seed: int,
        separator: int | None = None,
        weights: Weights | None = None,
    ) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.separator = separator
        self.weights = weights
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

    def rank_batch(self, step: int, layout: Layout, data_rank: int) -> Batch:
        """What one data parallel rank gets of a step.

        Over ranks and micro steps, each row of the global batch comes once: row
        (micro step * data + data_rank) * micro_batch + i.

        Raises:
            UserError: where no label of the global batch counts.
        """
        import torch

        shape = (layout.accumulation, layout.grid["data"], layout.micro_batch)
        mine = self.indices(step).reshape(shape)[:, data_rank]
        rows = read_rows(self.tokens, mine.ravel().tolist(), self.sequence_length, self.separator)
        loss_weights, total = None, float(self.global_batch_size * self.sequence_length)
        if self.weights is not None:
            weights = self.weights(step)
            total = float(weights.sum(dtype=np.float64))
            if total == 0.0:
                raise UserError(f"data.source: no label of step {step + 1} counts towards the loss")
            loss_weights = torch.from_numpy(weights.reshape(*shape, -1)[:, data_rank].copy())
        apart = (layout.accumulation, layout.micro_batch, self.sequence_length)
        return Batch(
            tokens=rows.tokens.view(apart),
            labels=rows.labels.view(apart),
            loss_weights=loss_weights,
            positions=None if rows.positions is None else rows.positions.view(apart),
            total_weight=total,
        )

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.sequences)
            self._epoch = (epoch, order)
        return self._epoch[1]


def load_batches(
    recipe: Recipe, say: Callable[[str], None] = print, weights: Weights | None = None
) -> tuple[Corpus, Batches]:
    """A recipe's tokenised source, and the batches that its steps take from it.

    Args:
        recipe: its `data` and `train` blocks decide both.
        say: receives a line where there is something to tell.
        weights: as for `Batches`.

    Raises:
        UserError: as `prepare` and `Batches`.
    """
    corpus = prepare(recipe.data, tokens_needed=tokens_needed(recipe), say=say)
    train = recipe.train
    batches = Batches(
        corpus.train,
        recipe.data.sequence_length,
        train.global_batch_size,
        train.seed,
        separator_of(recipe, corpus),
        weights,
    )
    return corpus, batches


def separator_of(recipe: Recipe, corpus: Corpus) -> int | None:
    """The token that divides rows into documents, where the recipe asks for that."""
    return corpus.tokenizer.separator if recipe.data.document_mask else None


def validation_set(
    tokens: TokenFile,
    sequence_length: int,
    sequences: int,
    micro_batch: int,
    data_rank: int = 0,
    data_size: int = 1,
    separator: int | None = None,
) -> ValidationSet:
    """One rank's micro batches of the fixed validation set: the file's first `sequences` sequences.

    The micro batches are the same for every number of ranks; rank r takes r, r + data_size, ... and
    all ranks get equally many, because under ZeRO-3 each forward pass is a collective: where they do
    not divide, some ranks repeat one with weights of 0. Only the last micro batch of a short file is
    smaller.

    Raises:
        UserError: where the held-out text does not fill one sequence.
    """
    import torch

    count = min(sequences, tokens.sequences(sequence_length))
    if count < 1:
        raise UserError(
            f"data.held_out: {len(tokens):,} held-out tokens do not fill one sequence of "
            f"{sequence_length}: raise data.held_out, lower data.sequence_length, or give more text"
        )
    pieces = [range(i, min(i + micro_batch, count)) for i in range(0, count, micro_batch)]
    mine = []
    for first in range(0, len(pieces), data_size):
        index = first + data_rank
        repeated = index >= len(pieces)
        rows = read_rows(tokens, pieces[0 if repeated else index], sequence_length, separator)
        if repeated:
            rows = rows._replace(loss_weights=torch.zeros(rows.tokens.shape))
        mine.append(rows)
    return ValidationSet(mine, float(count * sequence_length))


def read_rows(
    tokens: TokenFile, indices: Iterable[int], sequence_length: int, separator: int | None
) -> MicroBatch:
    """Some sequences of a file, each label counting once: `[len(indices), sequence_length]`."""
    import torch

    rows = torch.from_numpy(np.stack([tokens.read(i, sequence_length) for i in indices]))
    inputs, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    positions = None if separator is None else document_positions(inputs, separator)
    return MicroBatch(inputs, labels, None, positions)


def document_positions(tokens: "Tensor", separator: int) -> "Tensor":
    """Each token's place in its document: `[rows, sequence]` to the same, int64.

    A separator ends a document as a label, and begins the next one as a token: what follows it is
    predicted from it alone. A row begins at 0 wherever in a document it was cut.
    """
    import torch

    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    starts = torch.where(tokens == separator, places, 0)
    return places - starts.cummax(-1).values
