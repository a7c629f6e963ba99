"""Build batches from tokens, as a function of (seed, step) only."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from launch.config.layout import Layout
from launch.config.schema import Recipe
from launch.data.batch import Batch, MicroBatch, ValidationSet
from launch.data.conversations import ConversationFile
from launch.data.prepare import Corpus, prepare, tokens_needed
from launch.data.token_file import ANSWER, FIRST, FLAGS, TokenFile
from launch.data.tokenizer import Tokenizer
from launch.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Weights = Callable[[int], npt.NDArray[np.float32]]


class Batches:
    """The global batch of each step: all train sequences, reshuffled every epoch.

    The sequences of step s depend only on (seed, s), not on the ranks or earlier reads, so a
    resumed run needs only its step number. A batch can span two epochs. The order comes from numpy
    and may change between numpy releases.

    Args:
        tokens: the train tokens.
        sequence_length: tokens per row.
        global_batch_size: rows per step.
        seed: seed of the order.
        separator: the token at which rows are split into documents; None: each row is one document.
        weights: a step's loss weights `[global_batch_size, sequence_length]`, as a function of only
            the step, so that each rank knows their sum; None: all 1, or in conversations 1 for the
            labels of answers.

    Raises:
        UserError: if the text does not fill one global batch.
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
            if isinstance(tokens, ConversationFile):
                raise UserError(
                    f"data.source: {tokens.describe()}; that is fewer than one global batch of "
                    f"{global_batch_size}: give more conversations, or lower train.global_batch_size"
                )
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
        """One data parallel rank's share of a step.

        Each row of the global batch is used exactly once over ranks and micro steps: the i-th row
        of a micro batch is row (micro step * data + data_rank) * micro_batch + i.

        Raises:
            UserError: if the loss weights of the global batch sum to 0.
        """
        import torch

        shape = (layout.accumulation, layout.grid["data"], layout.micro_batch)
        everyone = self.indices(step)
        mine = everyone.reshape(shape)[:, data_rank]
        rows = read_rows(self.tokens, mine.ravel().tolist(), self.sequence_length, self.separator)
        apart = (layout.accumulation, layout.micro_batch, self.sequence_length)
        loss_weights = None if rows.loss_weights is None else rows.loss_weights.view(apart)
        total = _total_weight(self.tokens, everyone.tolist(), self.sequence_length)
        if self.weights is not None:
            weights = self.weights(step)
            total = float(weights.sum(dtype=np.float64))
            if total == 0.0:
                raise UserError(f"data.source: no label of step {step + 1} counts towards the loss")
            loss_weights = torch.from_numpy(weights.reshape(*shape, -1)[:, data_rank].copy())
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
    recipe: Recipe,
    say: Callable[[str], None] = print,
    weights: Weights | None = None,
    tokenizer: Tokenizer | None = None,
) -> tuple[Corpus, Batches]:
    """Tokenise a recipe's source, and return it with its training batches.

    Args:
        recipe: its `data` and `train` blocks are used.
        say: called with each progress line.
        weights: see `Batches`.
        tokenizer: see `prepare`.

    Raises:
        UserError: see `prepare` and `Batches`.
    """
    corpus = prepare(recipe.data, tokens_needed=tokens_needed(recipe), say=say, tokenizer=tokenizer)
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
    """The token that splits rows of text into documents; None unless `data.document_mask` is set."""
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

    The micro batches are the same for any number of ranks; rank r takes r, r + data_size, ... All
    ranks get the same number, because each ZeRO-3 forward pass is a collective: if the micro
    batches do not divide evenly, some ranks repeat one with weight 0. Only the last micro batch of
    a short file is smaller.

    Raises:
        UserError: if the held-out text does not fill one sequence.
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
    return ValidationSet(mine, _total_weight(tokens, range(count), sequence_length))


def _total_weight(tokens: TokenFile, rows: Sequence[int], sequence_length: int) -> float:
    """The number of labels in these rows that count."""
    if isinstance(tokens, ConversationFile):
        return float(tokens.answers(rows))
    return float(len(rows) * sequence_length)


def read_rows(
    tokens: TokenFile, indices: Iterable[int], sequence_length: int, separator: int | None
) -> MicroBatch:
    """Read sequences of a file: `[len(indices), sequence_length]`.

    Each label counts 1; of conversations only those that are part of an answer, and each
    conversation is a document.
    """
    import torch

    if isinstance(tokens, ConversationFile):
        flagged = torch.from_numpy(np.stack([tokens.read_flagged(i) for i in indices]))
        ids = flagged // FLAGS
        return MicroBatch(
            ids[:, :-1].contiguous(),
            ids[:, 1:].contiguous(),
            (flagged[:, 1:] & ANSWER).float(),
            positions_from((flagged[:, :-1] & FIRST) > 0),
        )
    rows = torch.from_numpy(np.stack([tokens.read(i, sequence_length) for i in indices]))
    inputs, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    positions = None if separator is None else document_positions(inputs, separator)
    return MicroBatch(inputs, labels, None, positions)


def document_positions(tokens: "Tensor", separator: int) -> "Tensor":
    """Each token's position in its document. Input and output (int64) are `[rows, sequence]`.

    As a label, a separator ends a document; as an input token, it starts the next one, whose first
    token is predicted from it alone. A row starts at position 0 even in the middle of a document.
    """
    return positions_from(tokens == separator)


def positions_from(starts: "Tensor") -> "Tensor":
    """Positions (int64) that count from each start: input (bool) and output are `[rows, sequence]`."""
    import torch

    places = torch.arange(starts.shape[1]).expand_as(starts)
    return places - torch.where(starts, places, 0).cummax(-1).values
