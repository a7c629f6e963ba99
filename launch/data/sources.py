"""Read documents from a source.

A source is `python-stdlib` (the standard library's source code: real text without a download),
local files, folders or globs (`local_files.py`), or the name of a data set on the Hub.
"""

import difflib
import glob
import json
from collections.abc import Iterable, Iterator
from errno import EDQUOT, ENOSPC
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

from launch.config.schema import Data
from launch.data.local_files import STDLIB, SourceFile
from launch.errors import UserError

Document: TypeAlias = tuple[str, str]
"""A key, which is unique and does not depend on the location of the corpus, and the text."""

Cell: TypeAlias = tuple[str, str, Any]
"""A document's key, where it is (a file and line, for messages), and what its column holds."""

Row: TypeAlias = tuple[str, dict[str, Any]]
"""A row of a file and where it is, for example "line 7"."""

BYTE_ORDER_MARK = "\ufeff"


def documents(data: Data, files: list[SourceFile] | None, cache: Path) -> Iterator[Document]:
    """Iterate over the non-empty documents of a source in a fixed order.

    A txt, md or py file is one document and must fit in memory; a jsonl, json, csv or parquet file
    has one document per row, in the column `data.text_field`. A document of only white space is none.

    Args:
        data: the recipe's block.
        files: the result of `local_files(data)`.
        cache: the cache folder of the `datasets` library.

    Raises:
        UserError: naming the file or setting that cannot be read.
    """
    found = ((key, _as_text(data, place, value)) for key, place, value in cells(data, files, cache))
    return ((key, text) for key, text in found if text.strip())


def cells(data: Data, files: list[SourceFile] | None, cache: Path) -> Iterator[Cell]:
    """Iterate over what a source has in its column, as it is; see `documents`."""
    if files is None:
        return _from_hub(data, cache)
    if data.source == STDLIB:
        return _from_stdlib(files)
    return _from_files(data, files, cache)


def _from_stdlib(files: list[SourceFile]) -> Iterator[Cell]:
    for file in files:
        try:
            yield file.key, file.key, file.path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few files deliberately use other encodings


def _from_files(data: Data, files: list[SourceFile], cache: Path) -> Iterator[Cell]:
    files = [file for file in files if file.stat().st_size]
    for reader, members in groupby(files, key=lambda file: file.reader):
        group = list(members)
        if reader == "text":
            # One call for all files: a folder may hold a hundred thousand small ones.
            loaded = _load(data, cache, "text", group, sample_by="document")
            texts = (row["text"].removeprefix(BYTE_ORDER_MARK) for row in loaded)
            for each, text in zip(group, texts, strict=True):
                yield each.key, str(each.path), text
            continue
        for file in group:
            rows = ROW_READERS[reader](data, file, cache)
            yield from _numbered_cells(rows, data, str(file.path), prefix=f"{file.key}:")


def _json_lines(data: Data, file: SourceFile, cache: Path) -> Iterator[Row]:
    # The library's JSON reader infers the columns from the first 10 MB and fails on a later line
    # with a new one; its errors do not name the line either.
    lines = (row["text"] for row in _load(data, cache, "text", [file], sample_by="line"))
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.removeprefix(BYTE_ORDER_MARK))
        except ValueError as error:
            raise UserError(f"data.source: {file.path} line {number} is no JSON: {error}") from None
        yield _object(file, "line", number, row)


def _json(data: Data, file: SourceFile, cache: Path) -> Iterator[Row]:
    """One array of objects, which must fit in memory, or the lines of a jsonl file."""
    lines = (row["text"] for row in _load(data, cache, "text", [file], sample_by="line"))
    first = next((line.removeprefix(BYTE_ORDER_MARK) for line in lines if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _json_lines(data, file, cache)
        return
    (whole,) = (row["text"] for row in _load(data, cache, "text", [file], sample_by="document"))
    try:
        rows = json.loads(whole.removeprefix(BYTE_ORDER_MARK))
    except ValueError as error:
        raise UserError(f"data.source: {file.path} is no JSON: {error}") from None
    for number, row in enumerate(rows):
        yield _object(file, "item", number, row)


def _object(file: SourceFile, kind: str, number: int, row: Any) -> Row:
    if not isinstance(row, dict):
        raise UserError(
            f"data.source: {file.path} {kind} {number} is a JSON {type(row).__name__}; "
            f"each {kind} has to be an object with the text or the messages in one field"
        )
    return f"{kind} {number}", row


def _csv(data: Data, file: SourceFile, cache: Path) -> Iterator[Row]:
    # Without na_filter, the text "NA" would be read as nothing.
    tabs = ".tsv" in [suffix.lower() for suffix in file.path.suffixes]
    yield from _numbered(
        _load(data, cache, "csv", [file], sep="\t" if tabs else ",", na_filter=False)
    )


def _parquet(data: Data, file: SourceFile, cache: Path) -> Iterator[Row]:
    from pyarrow import parquet

    try:
        columns = parquet.read_schema(file.path).names
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UserError(f"data.source: {file.path} is no readable parquet: {error}") from None
    field = _check_field(columns, data, str(file.path))
    yield from _numbered(_load(data, cache, "parquet", [file], columns=[field]))


def _numbered(rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
    return ((f"row {number}", row) for number, row in enumerate(rows))


# Value of READERS -> its reader. In "text", which is not listed, each file is one document.
ROW_READERS = {"jsonl": _json_lines, "json": _json, "csv": _csv, "parquet": _parquet}


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
                if reader == "text" and not file.compressed:
                    file.path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as first:
                files, reason = [file], first
                break
        where = f"{files[0].path} is not readable as {reader}"
        raise UserError(f"data.source: {where}: {_first_line(reason)}") from error


def _from_hub(data: Data, cache: Path) -> Iterator[Cell]:
    try:
        rows = _datasets().load_dataset(
            data.source,
            data.subset,
            split=data.split,
            streaming=data.streaming,
            cache_dir=str(cache),
        )
        if rows.column_names is not None:  # a stream may not know its columns until the first row
            rows = rows.select_columns([_check_field(rows.column_names, data, str(data.source))])
        yield from _numbered_cells(_numbered(rows), data, str(data.source), prefix="")
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


def _numbered_cells(rows: Iterable[Row], data: Data, where: str, prefix: str) -> Iterator[Cell]:
    for index, (place, row) in enumerate(rows):
        field = _check_field(row, data, f"{where} {place}")
        yield f"{prefix}{index}", f"{where} {place}", row[field]


def _as_text(data: Data, place: str, value: Any) -> str:
    if not isinstance(value, str | None):
        raise UserError(
            f"data.text_field: '{data.text_field}' of {place} is {type(value).__name__}, "
            "not text; name another column"
        )
    return without_surrogates(value or "")


def without_surrogates(text: str) -> str:
    """Text that can be encoded as UTF-8: JSON can escape a lone surrogate, which cannot be."""
    return text.encode(errors="replace").decode()


def _check_field(columns: Iterable[str], data: Data, where: str) -> str:
    field, names = str(getattr(data, data.column_key)), list(columns)
    if field not in names:
        close = difflib.get_close_matches(field, names, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"choose from: {', '.join(names)}"
        raise UserError(f"data.{data.column_key}: {where} has no '{field}'; {hint}")
    return field


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
