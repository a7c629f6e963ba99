"""Tokenise text to disk, once.

`prepare` writes two flat files of token ids, train and held-out, which later runs memory-map.
`Batches` selects the sequences of each step and each rank's share of them.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EACCES, EDQUOT, EEXIST, ENOLCK, ENOSPC, ENOTDIR, ENOTSUP, EPERM, EROFS
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from launch.config.schema import Data, Recipe
from launch.data.chat import ChatTemplate, load_template, write_conversations
from launch.data.conversations import ConversationFile
from launch.data.local_files import STDLIB, SourceFile, local_files
from launch.data.sources import cells, documents
from launch.data.token_file import FLAGS, SplitWriter, TokenFile, write_documents
from launch.data.tokenizer import Tokenizer, load_tokenizer
from launch.errors import UserError
from launch.paths import ROOT
from launch.runtime.locks import acquire

if TYPE_CHECKING:
    pass

FORMAT = 2  # increment when the same settings produce different tokens
NO_LOCKS = (ENOLCK, ENOTSUP)
TRAIN, HELD_OUT, META = "train.bin", "held_out.bin", "meta.json"


@dataclass(frozen=True)
class Corpus:
    """A tokenised source. `documents` and `text_bytes` (UTF-8) are totals of train and held-out.

    Of conversations, the files are `ConversationFile`s.
    """

    train: TokenFile
    held_out: TokenFile
    tokenizer: Tokenizer
    folder: Path
    documents: int
    text_bytes: int


def tokens_needed(recipe: Recipe) -> int:
    """The number of train tokens that a run needs to avoid repeating data."""
    sequences = recipe.train.steps * recipe.train.global_batch_size
    return sequences * recipe.data.sequence_length + 1


def prepare(
    data: Data,
    *,
    tokens_needed: int,
    say: Callable[[str], None] = print,
    tokenizer: Tokenizer | None = None,
) -> Corpus:
    """Tokenise a source, unless it is cached, and open the result.

    All ranks can call this at once, before the process group exists: one builds under a file lock,
    the others wait. The result is renamed to its final name when complete, so an interrupted build
    is never mistaken for a complete one.

    The cache key covers everything that affects the tokens, including changes to local files. A Hub
    data set is not checked for updates: delete the folder to download it again.

    Args:
        data: the recipe's block.
        tokens_needed: the number of train tokens at which a streamed source stops; see
            `tokens_needed()`. Other sources are used in full.
        say: called with each progress line.
        tokenizer: the recipe's, if it is loaded already.

    Raises:
        UserError: for an unreadable source or tokenizer, too little text, or a cache folder that is
            full or not writable.
    """
    tokenizer = tokenizer or load_tokenizer(data.tokenizer)
    files = local_files(data, say)
    template = _chat_template(data, tokenizer, files)
    limit = tokens_needed if data.streaming and data.source != STDLIB else None
    cache = (
        ROOT / ".cache" / "data" if data.cache_dir is None else Path(data.cache_dir).expanduser()
    )
    folder = cache / _fingerprint(data, tokenizer, files, limit, template)
    with _disk_errors(cache):
        meta = _read_meta(folder)
        if meta is None:
            cache.mkdir(parents=True, exist_ok=True)
            with _locked(folder, say):
                # Another rank may have been first.
                meta = _read_meta(folder) or _build(
                    data, tokenizer, files, limit, folder, say, template
                )

    def opened(name: str) -> TokenFile:
        if template is None:
            return TokenFile(folder / name, meta["dtype"])
        length = data.sequence_length
        return ConversationFile(folder / name, meta["dtype"], length, tokenizer.separator)

    train, held_out = opened(TRAIN), opened(HELD_OUT)
    if isinstance(train, ConversationFile):
        say(f"data: {train.describe()}")
    return Corpus(train, held_out, tokenizer, folder, meta["documents"], meta["text_bytes"])


def _chat_template(
    data: Data, tokenizer: Tokenizer, files: list[SourceFile] | None
) -> ChatTemplate | None:
    """The template of conversations; None for text.

    Raises:
        UserError: if there is none, or the source has files that hold no conversations.
    """
    if data.format == "text":
        return None
    for file in files or []:
        if file.reader not in ("jsonl", "json", "parquet"):
            raise UserError(
                f"data.format: chat reads jsonl, json and parquet, and {file.path} is none of them; "
                "name other files in data.source, or use data.format=text"
            )
    return load_template(data, tokenizer)


def _fingerprint(
    data: Data,
    tokenizer: Tokenizer,
    files: list[SourceFile] | None,
    limit: int | None,
    template: ChatTemplate | None,
) -> str:
    other = {"sequence_length", "cache_dir", "tokenizer", "streaming"}
    chat = {"format", "messages_field", "chat_template"}
    settings = data.model_dump(exclude=other | chat)
    if template is not None:
        settings |= {"messages_field": data.messages_field, "chat": vars(template)}
    content: Any = None
    if data.source == STDLIB:
        # No modification times: the key is the same on every machine with this Python.
        content = [python_version(), [(f.key, f.stat().st_size) for f in files or []]]
    elif files is not None:
        stats = [(file.key, file.stat()) for file in files]
        content = [(key, stat.st_size, stat.st_mtime_ns) for key, stat in stats]
        del settings["source"]  # the list of files replaces it
    parts = [FORMAT, settings, tokenizer.identity, limit, content]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=10).hexdigest()


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """The metadata of a complete cache; None if it is absent or damaged."""
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_text())
        item = np.dtype(meta["dtype"]).itemsize
        sizes = [(folder / name).stat().st_size for name in (TRAIN, HELD_OUT)]
        return meta if sizes == [meta["train"] * item, meta["held_out"] * item] else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(folder.with_suffix(".lock"))  # the kernel releases it when its holder dies
    try:
        acquire(lock, timeout=0)
    except Timeout:
        say(f"waiting for another process to tokenise into {folder}")
        acquire(lock)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _disk_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or cache
        if error.errno in (ENOSPC, EDQUOT):
            problem = f"no space left for {where}; free some"
        elif error.errno in NO_LOCKS:
            problem = (
                f"the disk of {cache} has no file locks ({error.strerror}); mount it with locks"
            )
        elif error.errno in (EACCES, EPERM, EROFS, EEXIST, ENOTDIR):
            problem = f"cannot use {where} ({error.strerror}); it has to be a writable folder"
        else:
            raise
        raise UserError(f"data.cache_dir: {problem}, or name another folder") from error


def _build(
    data: Data,
    tokenizer: Tokenizer,
    files: list[SourceFile] | None,
    limit: int | None,
    folder: Path,
    say: Callable[[str], None],
    template: ChatTemplate | None,
) -> dict[str, Any]:
    if folder.exists():
        say(f"{folder} is damaged: tokenising again")
    building = folder.with_suffix(".building")
    shutil.rmtree(building, ignore_errors=True)  # left by a killed process
    building.mkdir()
    # Once tokenised, the library's copy of local files is not needed; Hub downloads are kept.
    copies = folder.parent / "hub" if files is None else building / "copies"
    try:
        writer = SplitWriter(
            building / TRAIN, building / HELD_OUT, data.held_out,
            tokenizer.vocab_size * (1 if template is None else FLAGS),
        )  # fmt: skip
        try:
            if template is None:
                found = documents(data, files, copies)
                text_bytes = write_documents(writer, found, tokenizer, limit)
            else:
                rows = cells(data, files, copies)
                text_bytes = write_conversations(writer, rows, tokenizer, template, limit)
            count = writer.train.documents + writer.held_out.documents
            if not count:
                raise UserError(f"data.source: there is no text in {data.source}")
            if count == 1 and template is not None:
                raise UserError(
                    f"data.source: {data.source} has one conversation; one more is needed, to hold out"
                )
            writer.finish()
        finally:
            writer.close()
        meta = {
            "source": data.source,
            "tokenizer": tokenizer.name,
            "dtype": writer.dtype.name,
            "train": writer.train.tokens,
            "held_out": writer.held_out.tokens,
            "documents": count,
            "text_bytes": text_bytes,
        }
        (building / META).write_text(json.dumps(meta, indent=2) + "\n")
        shutil.rmtree(building / "copies", ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    what = "documents" if template is None else "conversations"
    say(
        f"tokenised {count:,} {what} ({text_bytes / 1e6:,.1f} MB) into {meta['train']:,} train "
        f"and {meta['held_out']:,} held-out tokens: {folder}"
    )
    return meta
