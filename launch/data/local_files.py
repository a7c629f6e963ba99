"""Find the files of a local source: `python-stdlib`, or files, folders and globs."""

import glob
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.config.schema import Data
from launch.errors import UserError

STDLIB = "python-stdlib"
READERS = {
    ".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl", ".json": "json",
    ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")  # after one of those above, except .parquet
KNOWN = f"{', '.join(READERS)} (and {', '.join(COMPRESSED)} after them)"
# Tests are mostly long tables, and Debian does not ship them. sysconfig and config-* depend on the
# machine that built this Python.
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
BUILD_FILES = ("_sysconfigdata", "config-")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
ABOUT_THE_DATA = ("readme", "license", "licence")  # in a folder, these are no part of it


@dataclass(frozen=True)
class SourceFile:
    """A local file, and its path relative to the folder named in the recipe."""

    path: Path
    key: str

    @property
    def reader(self) -> str:
        """A value of `READERS`."""
        reader = _reader_of(self.path)
        assert reader is not None
        return reader

    @property
    def compressed(self) -> bool:
        """Whether the file is compressed."""
        return self.path.suffix.lower() in COMPRESSED

    def stat(self) -> os.stat_result:
        """The file's size and modification time.

        Raises:
            UserError: if the file has vanished, or is a link to nothing.
        """
        try:
            return self.path.stat()
        except OSError as error:
            raise UserError(
                f"data.source: {self.path} is not readable ({error.strerror}); remove it or the link "
                "to it, or name the files to read"
            ) from None


def local_files(
    data: Data, say: Callable[[str], None] = lambda line: None
) -> list[SourceFile] | None:
    """The files of a local source in a fixed order; None if the source is a Hub data set.

    `say` gets a line for each folder with files that are not read.

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
        files = [file for name in names for file in _matching(name, say)]
    if data.subset is not None or data.split != "train":
        key = "split" if data.subset is None else "subset"
        raise UserError(
            f"data.{key}: only Hub data sets have one, and data.source is local; leave it out"
        )
    return files


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
    return bool(HUB_NAME.fullmatch(name)) and _reader_of(Path(name)) is None


def _reader_of(path: Path) -> str | None:
    """The reader for a file of this name; None if there is none."""
    suffix = path.suffix.lower()
    if suffix not in COMPRESSED:
        return READERS.get(suffix)
    reader = READERS.get(Path(path.stem).suffix.lower())
    return None if reader == "parquet" else reader


def _walk(folder: Path, seen: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """All files below a folder, through links to folders, except those that lead back up."""
    seen |= {folder.resolve()}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif path.resolve() not in seen:
            yield from _walk(path, seen)


def _in_folder(name: str, say: Callable[[str], None]) -> list[SourceFile]:
    given = Path(name).expanduser()
    found, skipped = [], []
    for path in _walk(given):
        reader = _reader_of(path)
        about = path.stem.lower() in ABOUT_THE_DATA and reader in (None, "text")
        if reader is None or about:
            skipped.append(path.name if about else path.suffix or path.name)
            continue
        key = Path(given.resolve().name, path.relative_to(given)).as_posix()
        found.append(SourceFile(path, key))
    if not found:
        raise UserError(f"data.source: the folder {name} holds no {KNOWN} file")
    if skipped:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(Counter(skipped).items()))
        say(f"data.source: {len(skipped)} files of {name} are not read: {kinds}")
    return sorted(found, key=lambda file: file.key)


def _matching(name: str, say: Callable[[str], None]) -> list[SourceFile]:
    given = Path(name).expanduser()
    if given.is_dir():
        return _in_folder(name, say)
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
        if _reader_of(path) is None:
            raise UserError(f"data.source: {path} is none of {KNOWN}; convert or rename it")
    if paths == [given]:
        return [SourceFile(given, given.name)]
    fixed = os.path.commonpath([path.parent for path in paths])
    return [SourceFile(path, path.relative_to(fixed).as_posix()) for path in paths]
