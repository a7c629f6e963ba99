"""Token ids in flat files: written once, split into train and held-out, and memory-mapped."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launch.data.sources import Document
from launch.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 4 * 2**20  # text per tokenizer call
COPY_BYTES = 64 * 2**20
# In a file of conversations a value is 4 x id + 2 x (begins a conversation) + (is part of an answer).
FLAGS, FIRST, ANSWER = 4, 2, 1


class TokenFile:
    """Token ids in a flat file, memory-mapped and read on demand.

    Sequence i of length S is tokens i*S to i*S + S inclusive: S inputs and S targets shifted by
    one, so each token is predicted once. Documents are packed: a sequence may hold the end of one,
    a separator, and the start of the next.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self._tokens = np.memmap(path, dtype=dtype, mode="r")

    def __len__(self) -> int:
        return len(self._tokens)

    def sequences(self, sequence_length: int) -> int:
        """The number of whole sequences in the file; the remainder is not used."""
        return (len(self) - 1) // sequence_length

    def read(self, index: int, sequence_length: int) -> npt.NDArray[np.int64]:
        """Ids of sequence `index`, shape [sequence_length + 1]; the last also starts the next one.

        Raises:
            IndexError: unless 0 <= index < sequences(sequence_length).
        """
        if not 0 <= index < self.sequences(sequence_length):
            raise IndexError(
                f"sequence {index} of {self.sequences(sequence_length)} in {self.path}"
            )
        start = index * sequence_length
        return self._tokens[start : start + sequence_length + 1].astype(np.int64)


class SplitFile:
    """One of the two files while it is being written."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.tokens = 0
        self.documents = 0
        self.dtype = dtype
        self.file = path.open("w+b")
        # (hash, first token, tokens) of the document closest to the border with the other part
        self.nearest: tuple[int, int, int] | None = None

    def append(self, ids: npt.NDArray[Any]) -> None:
        """Append ids."""
        self.file.write(ids.astype(self.dtype).tobytes())
        self.tokens += len(ids)

    def cut(self, start: int, count: int) -> npt.NDArray[Any]:
        """Remove tokens and close the gap. Holds only `count` tokens in memory."""
        item = self.dtype.itemsize
        self.file.seek(start * item)
        taken = np.frombuffer(self.file.read(count * item), dtype=self.dtype)
        to = start * item
        while chunk := self.file.read(COPY_BYTES):
            behind = self.file.tell()
            self.file.seek(to)
            to += self.file.write(chunk)
            self.file.seek(behind)
        self.file.truncate(to)
        self.file.seek(to)
        self.tokens -= count
        return taken


class SplitWriter:
    """Writes documents to a train and a held-out file.

    The hash of a document's key selects its file, independently of the order and number of other
    documents. Only if a file would stay empty does the document closest to the border change sides;
    a corpus of one document is split near its end.

    Args:
        train: path of the train file.
        held_out: path of the held-out file.
        share: approximate fraction of documents to hold out, above 0 and below 1.
        vocab_size: the largest id plus one; determines whether ids take 2 or 4 bytes.
    """

    def __init__(self, train: Path, held_out: Path, share: float, vocab_size: int) -> None:
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self.share = share
        self.train = SplitFile(train, self.dtype)
        self.held_out = SplitFile(held_out, self.dtype)

    def add(self, key: str, ids: npt.NDArray[Any]) -> None:
        """Write one document, including its separator."""
        place = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
        border = self.share * 2**64
        part = self.held_out if place < border else self.train
        if part.nearest is None or abs(place - border) < abs(part.nearest[0] - border):
            part.nearest = (place, part.tokens, len(ids))
        part.append(ids)
        part.documents += 1

    def enough(self, tokens: int) -> bool:
        """Whether there are this many train tokens and a matching share of held-out tokens.

        Twice as many train tokens are always enough, in case held-out documents are rare.
        """
        share = tokens * self.share / (1 - self.share)
        return self.train.tokens >= tokens and (
            self.held_out.tokens >= share or self.train.tokens >= 2 * tokens
        )

    def finish(self) -> None:
        """Ensure that both files have tokens, and sync them. Needs at least one document."""
        for part, other in ((self.train, self.held_out), (self.held_out, self.train)):
            if part.nearest is None or other.documents:
                continue
            _, start, count = part.nearest
            if part.documents == 1:
                held_out = max(1, round(count * self.share))
                start, count = (0, count - held_out)
                if other is self.held_out:
                    start, count = (count, held_out)
            other.append(part.cut(start, count))
        self.close(sync=True)

    def close(self, *, sync: bool = False) -> None:
        """Close the files without further checks."""
        for part in (self.train, self.held_out):
            if sync:
                part.file.flush()
                os.fsync(part.file.fileno())
            part.file.close()


def write_documents(
    writer: SplitWriter, documents: Iterable[Document], tokenizer: Tokenizer, limit: int | None
) -> int:
    """Tokenise documents and write each one, followed by a separator.

    Holds a few megabytes of text in memory at a time, or the longest document. Shows a progress bar
    on a terminal.

    Args:
        writer: the output; the caller must call `finish`.
        documents: (key, text) pairs.
        tokenizer: encodes the text.
        limit: stop at this many train tokens plus their held-out share; None for no limit.

    Returns:
        The number of UTF-8 bytes of text written.
    """
    from tqdm import tqdm

    text_bytes = 0
    with tqdm(desc="tokenising", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for batch in _in_batches(documents):
            encoded = tokenizer.encode_batch([text for _, text in batch])
            for (key, text), ids in zip(batch, encoded, strict=True):
                writer.add(key, np.append(ids, tokenizer.separator))
                size = len(text.encode())
                text_bytes += size
                bar.update(size)
                if limit is not None and writer.enough(limit):
                    return text_bytes
    return text_bytes


def _in_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document[1])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
