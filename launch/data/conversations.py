"""Conversations in a token file, packed into rows of equal length.

A row holds as many whole conversations as fit. Attention keeps them apart: positions count from the
start of each. What is left of a row is padding, which counts as little as the questions do.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from launch.data.token_file import ANSWER, FIRST, FLAGS, TokenFile

Values: TypeAlias = npt.NDArray[np.int64]


class ConversationFile(TokenFile):
    """A file written by `write_conversations`, whose sequences are rows of whole conversations.

    A row has S + 1 tokens, as in `TokenFile`: S inputs and S labels. A longer conversation loses its
    end (TRL and torchtune truncate as well); one without an answer in what is left is left out.

    Args:
        path: the file.
        dtype: of its values.
        sequence_length: S.
        padding: the id that fills a row.
    """

    def __init__(self, path: Path, dtype: str, sequence_length: int, padding: int) -> None:
        super().__init__(path, dtype)
        self.sequence_length, self.padding = sequence_length, padding
        values = np.asarray(self._tokens)
        starts = np.flatnonzero(values & FIRST)
        lengths = np.diff(starts, append=len(values))
        answer = (values & ANSWER).astype(np.uint8)
        counted = np.add.reduceat(answer, starts, dtype=np.int64)
        too_long = lengths > sequence_length + 1
        for i in np.flatnonzero(too_long):
            counted[i] = answer[starts[i] : starts[i] + sequence_length + 1].sum()
        lengths = np.minimum(lengths, sequence_length + 1)
        usable = np.flatnonzero(counted)
        self.conversations = len(starts)
        self.truncated = int(too_long[usable].sum())
        self.left_out = self.conversations - len(usable)
        self._spans = np.stack([starts, lengths], axis=1)[usable]
        self._rows = pack(self._spans[:, 1].tolist(), sequence_length + 1)
        self._answers = np.array([counted[usable[row]].sum() for row in self._rows], dtype=np.int64)

    def sequences(self, sequence_length: int) -> int:
        """The number of rows, which are packed for one length."""
        assert sequence_length == self.sequence_length
        return len(self._rows)

    def answers(self, rows: Iterable[int]) -> int:
        """The number of labels in these rows that count: the tokens of their answers."""
        return int(self._answers[list(rows)].sum())

    def read(self, index: int, sequence_length: int) -> Values:
        """Ids of row `index`, shape [sequence_length + 1]."""
        assert sequence_length == self.sequence_length
        return self.read_flagged(index) // FLAGS

    def read_flagged(self, index: int) -> Values:
        """The same with flags: 4 x id + 2 x (begins a conversation) + (is part of an answer)."""
        row = np.full(self.sequence_length + 1, self.padding * FLAGS, dtype=np.int64)
        end = 0
        for conversation in self._rows[index]:
            start, length = self._spans[conversation]
            row[end : end + length] = self._tokens[start : start + length]
            end += length
        row[end : end + 1] |= FIRST  # padding is a document of its own
        return row

    def describe(self) -> str:
        """What became of the conversations, in a line."""
        filled = float(self._spans[:, 1].sum()) / max(
            1, len(self._rows) * (self.sequence_length + 1)
        )
        return (
            f"{self.conversations:,} conversations in {len(self._rows):,} rows of "
            f"{self.sequence_length}, {100 * filled:.0f}% full; {self.truncated:,} lost what is beyond "
            f"a row, {self.left_out:,} are left out, as no answer begins before that"
        )


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Put items into rows of `room`, each into the fullest row that still takes it (best fit).

    Items keep their order, so that the first rows hold the first items, long and short ones. Returns
    the items of each row. Needs `0 < length <= room`.
    """
    rows: list[list[int]] = []
    spaces: list[int] = []  # distinct sizes of what is left of rows, in order
    rows_with: dict[int, list[int]] = {}
    for item, length in enumerate(lengths):
        at = bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            row = rows_with[space].pop()
            if not rows_with[space]:
                del rows_with[space], spaces[at]
        else:
            space, row = room, len(rows)
            rows.append([])
        rows[row].append(item)
        if left := space - length:
            if left not in rows_with:
                insort(spaces, left)
                rows_with[left] = []
            rows_with[left].append(row)
    return rows
