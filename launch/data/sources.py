"""Read documents from a source.

A source is `python-stdlib` (the standard library's source code: real text without a download),
local files, folders or globs, or the name of a data set on the Hub.
"""

import difflib
import glob
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

from launch.config.schema import Data
from launch.errors import UserError

Document: TypeAlias = tuple[str, str]
"""The text and its key, which is unique and does not depend on the location of the corpus."""

STDLIB = "python-stdlib"
READERS = {
    ".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl", ".parquet": "parquet",
}  # fmt: skip
# Tests are mostly long tables, and Debian does not ship them. sysconfig and config-* depend on the
# machine that built this Python.
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
BUILD_FILES = ("_sysconfigdata", "config-")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class SourceFile:
    """A local file, and its path relative to the folder named in the recipe."""

    path: Path
    key: str


def local_files(data: Data) -> list[SourceFile] | None:
    """The files of a local source in a fixed order; None if the source is a Hub data set.

    Raises:
        UserError: for a path that is missing, has no usable files, or has an unknown suffix, and
            for settings that only apply to the Hub.
    """
    if data.source == STDLIB:
        files = _stdlib_files()
    else:
        names = [data.source] if isinstance(data.source, str) else data.source
        if not names:
            raise UserError("data.source: the list is empty; name a file or a folder")
        if isinstance(data.source, str) and _is_hub_name(data.source):
            return None
        files = [file for name in names for file in _matching(name)]
    if data.subset is not None or data.split != "train":
        key = "split" if data.subset is None else "subset"
        raise UserError(
            f"data.{key}: only Hub data sets have one, and data.source is local; leave it out"
        )
    return files


def documents(data: Data, files: list[SourceFile] | None, cache: Path) -> Iterator[Document]:
    """Iterate over the non-empty documents of a source in a fixed order.

    A txt, md or py file is one document and must fit in memory; a jsonl or parquet file has one
    document per row, in the column `data.text_field`.

    Args:
        data: the recipe's block.
        files: the result of `local_files(data)`.
        cache: the cache folder of the `datasets` library.

    Raises:
        UserError: naming the file or setting that cannot be read.
    """
    if files is None:
        found = _from_hub(data, cache)
    elif data.source == STDLIB:
        found = _from_stdlib(files)
    else:
        found = _from_files(data, files, cache)
    return ((key, text) for key, text in found if text)


def _stdlib_files() -> list[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [n for n in subfolders if n not in NOT_STDLIB]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        files += [SourceFile(path, path.relative_to(root).as_posix()) for path in paths]
    files = [f for f in files if not f.key.startswith(BUILD_FILES) and f.path.is_file()]
    if not files:
        raise UserError(
            f"data.source: this Python has no source files in {root}; install them (on Debian the "
            "package libpython3-stdlib), or name files of your own"
        )
    return sorted(files, key=lambda file: file.key)


def _is_hub_name(name: str) -> bool:
    if glob.has_magic(name) or Path(name).expanduser().exists():
        return False
    return bool(HUB_NAME.fullmatch(name)) and Path(name).suffix not in READERS


def _matching(name: str) -> list[SourceFile]:
    given = Path(name).expanduser()
    if given.is_dir():
        walked = (Path(folder, n) for folder, _, names in os.walk(given) for n in names)
        parts = ((path, path.relative_to(given)) for path in walked)
        found = [
            SourceFile(path, Path(given.resolve().name, part).as_posix())
            for path, part in parts
            if path.suffix in READERS and not any(p.startswith(".") for p in part.parts)
        ]
        if not found:
            raise UserError(f"data.source: the folder {name} holds no {', '.join(READERS)} file")
        return sorted(found, key=lambda file: file.key)
    if given.is_file():
        paths = [given]
    else:
        matches = sorted(Path(given.anchor).glob(str(given.relative_to(given.anchor))))
        paths = [path for path in matches if path.is_file() and not path.name.startswith(".")]
    if not paths:
        what = "no file matches" if glob.has_magic(name) else "there is no file or folder"
        raise UserError(
            f"data.source: {what} '{name}' below {Path.cwd()}; give '{STDLIB}', a path, a glob or "
            "(alone, not in a list) the name of a Hub data set"
        )
    for path in paths:
        if path.suffix not in READERS:
            raise UserError(
                f"data.source: {path} is none of {', '.join(READERS)}; convert or rename it"
            )
    if paths == [given]:
        return [SourceFile(given, given.name)]
    fixed = os.path.commonpath([path.parent for path in paths])
    return [SourceFile(path, path.relative_to(fixed).as_posix()) for path in paths]


def _from_stdlib(files: list[SourceFile]) -> Iterator[Document]:
    for file in files:
        try:
            yield file.key, file.path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few files deliberately use other encodings


def _from_files(data: Data, files: list[SourceFile], cache: Path) -> Iterator[Document]:
    files = [file for file in files if file.path.stat().st_size]
    for reader, members in groupby(files, key=lambda file: READERS[file.path.suffix]):
        group = list(members)
        if reader == "text":
            # One call for all files: a folder may hold a hundred thousand small ones.
            rows = _load(data, cache, "text", group, sample_by="document")
            yield from zip((f.key for f in group), (row["text"] for row in rows), strict=True)
            continue
        for file in group:
            rows = ROW_READERS[reader](data, file, cache)
            yield from _texts(rows, data.text_field, str(file.path), prefix=f"{file.key}:")


def _json_rows(data: Data, file: SourceFile, cache: Path) -> Iterator[dict[str, Any]]:
    # The library's JSON reader infers the columns from the first 10 MB and fails on a later line
    # with a new one; its errors do not name the line either.
    lines = (row["text"] for row in _load(data, cache, "text", [file], sample_by="line"))
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.removeprefix("\ufeff"))
        except ValueError as error:
            raise UserError(f"data.source: {file.path} line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(
                f"data.source: {file.path} line {number} is a JSON {type(row).__name__}; "
                "each line has to be an object with the text in one field"
            )
        yield row


def _parquet(data: Data, file: SourceFile, cache: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    try:
        columns = parquet.read_schema(file.path).names
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UserError(f"data.source: {file.path} is no readable parquet: {error}") from None
    _check_field(columns, data.text_field, str(file.path))
    yield from _load(data, cache, "parquet", [file], columns=[data.text_field])


# Suffix group in READERS -> its reader. In "text", which is not listed, each file is one document.
ROW_READERS = {"jsonl": _json_rows, "parquet": _parquet}


def _load(
    data: Data, cache: Path, reader: str, files: list[SourceFile], **options: Any
) -> Iterator[dict[str, Any]]:
    try:
        yield from _datasets().load_dataset(
            reader,
            # The library would treat brackets or stars in a file name as a glob pattern.
            data_files=[glob.escape(str(file.path.resolve())) for file in files],
            split="train",
            streaming=data.streaming,
            cache_dir=str(cache),
            **options,
        )
    except Exception as error:
        _reraise_disk_full(error)
        reason = error.__cause__ or error
        for file in files:
            try:
                if reader == "text":
                    file.path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as first:
                files, reason = [file], first
                break
        where = f"{files[0].path} is not readable as {reader}"
        raise UserError(f"data.source: {where}: {_first_line(reason)}") from error


def _from_hub(data: Data, cache: Path) -> Iterator[Document]:
    try:
        rows = _datasets().load_dataset(
            data.source,
            data.subset,
            split=data.split,
            streaming=data.streaming,
            cache_dir=str(cache),
        )
        if rows.column_names is not None:  # a stream may not know its columns until the first row
            _check_field(rows.column_names, data.text_field, str(data.source))
            rows = rows.select_columns([data.text_field])
        yield from _texts(rows, data.text_field, str(data.source), prefix="")
    except UserError:
        raise
    except Exception as error:  # name, subset, split, access, network, format: all end here
        _reraise_disk_full(error)
        raise UserError(
            f"data.source: no file or folder is called '{data.source}', and the Hub does not give "
            f"a data set (data.subset {data.subset}, data.split {data.split}): "
            f"{_first_line(error.__cause__ or error)}; check these names, the network, and "
            "`hf auth login` for a gated set"
        ) from error


def _texts(
    rows: Iterable[dict[str, Any]], field: str, where: str, prefix: str
) -> Iterator[Document]:
    for index, row in enumerate(rows):
        _check_field(row, field, where)
        text = row[field]
        if not isinstance(text, str | None):
            raise UserError(
                f"data.text_field: '{field}' of {where} row {index} is {type(text).__name__}, "
                "not text; name another column"
            )
        # JSON can escape a lone surrogate, which cannot be encoded as UTF-8.
        yield f"{prefix}{index}", (text or "").encode(errors="replace").decode()


def _check_field(columns: Iterable[str], field: str, where: str) -> None:
    names = list(columns)
    if field not in names:
        close = difflib.get_close_matches(field, names, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"choose from: {', '.join(names)}"
        raise UserError(f"data.text_field: {where} has no '{field}'; {hint}")


def _datasets() -> Any:
    import datasets

    datasets.disable_progress_bars()  # we show our own, in tokens
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # our errors are one line
    return datasets


def _reraise_disk_full(error: BaseException | None) -> None:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT):
            raise error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
