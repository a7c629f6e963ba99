"""Token ids in flat files: written once, in two parts, and mapped into memory on use."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launch.data.sources import Document
from launch.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 4 * 2**20  # text handed to the tokenizer at once
COPY_BYTES = 64 * 2**20


class TokenFile:
    """Token ids in a flat file, mapped into memory and read on use.

    Sequence i of length S is the tokens i*S to i*S + S, both included: S inputs and, one further
    on, S targets, so that each token is predicted once. Documents are packed: a sequence may hold
    the end of one, a separator, and the start of the next.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self._tokens = np.memmap(path, dtype=dtype, mode="r")

    def __len__(self) -> int:
        return len(self._tokens)

    def sequences(self, sequence_length: int) -> int:
        """How many whole sequences the file holds; what is left at its end is not used."""
        return (len(self) - 1) // sequence_length

    def read(self, index: int, sequence_length: int) -> npt.NDArray[np.int64]:
        """Sequence `index`: ids of shape [sequence_length + 1]; its last is the next one's first.

        Raises:
            IndexError: outside 0 <= index < sequences(sequence_length).
        """
        if not 0 <= index < self.sequences(sequence_length):
            raise IndexError(
                f"sequence {index} of {self.sequences(sequence_length)} in {self.path}"
            )
        start = index * sequence_length
        return self._tokens[start : start + sequence_length + 1].astype(np.int64)


class SplitFile:
    """One of the two files while it is written."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.tokens = 0
        self.documents = 0
        self.dtype = dtype
        self.file = path.open("w+b")
        # (hash, first token, tokens) of the document that is next to leave for the other part
        self.nearest: tuple[int, int, int] | None = None

    def append(self, ids: npt.NDArray[Any]) -> None:
        """Write ids after those that are there."""
        self.file.write(ids.astype(self.dtype).tobytes())
        self.tokens += len(ids)

    def cut(self, start: int, count: int) -> npt.NDArray[Any]:
        """Take tokens out; those behind move up. Only `count` tokens are held in memory."""
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

    A hash of its key alone sends a document to one of them, so that neither the order nor the
    number of the others matters. Only where that would leave a file empty, the document nearest to
    the border changes sides; a corpus of one document is cut near its end.

    Args:
        train: path of the train file.
        held_out: path of the held-out file.
        share: about which part of all documents is held out, above 0 and below 1.
        vocab_size: the largest id is one less; decides whether an id takes 2 or 4 bytes.
    """

    def __init__(self, train: Path, held_out: Path, share: float, vocab_size: int) -> None:
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self.share = share
        self.train = SplitFile(train, self.dtype)
        self.held_out = SplitFile(held_out, self.dtype)

    def add(self, key: str, ids: npt.NDArray[Any]) -> None:
        """Write one document, its separator included."""
        place = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
        border = self.share * 2**64
        part = self.held_out if place < border else self.train
        if part.nearest is None or abs(place - border) < abs(part.nearest[0] - border):
            part.nearest = (place, part.tokens, len(ids))
        part.append(ids)
        part.documents += 1

    def enough(self, tokens: int) -> bool:
        """Whether there are this many train tokens, and the held-out share that belongs to them.

        Where the first held-out document is long in coming, twice the train tokens are enough.
        """
        share = tokens * self.share / (1 - self.share)
        return self.train.tokens >= tokens and (
            self.held_out.tokens >= share or self.train.tokens >= 2 * tokens
        )

    def finish(self) -> None:
        """Leave tokens in both files, on disk. Needs at least one document."""
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
        """Close the files, whatever is in them."""
        for part in (self.train, self.held_out):
            if sync:
                part.file.flush()
                os.fsync(part.file.fileno())
            part.file.close()


def write_documents(
    writer: SplitWriter, documents: Iterable[Document], tokenizer: Tokenizer, limit: int | None
) -> int:
    """Tokenise documents and write each with a separator behind it.

    Memory holds a few megabytes of text at a time, or the longest document. A terminal shows a
    progress bar.

    Args:
        writer: where they go; not finished here.
        documents: (key, text) pairs.
        tokenizer: turns text into ids.
        limit: stop when there are this many train tokens and their held-out share; None for all.

    Returns:
        The UTF-8 bytes of the text that was written.
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
