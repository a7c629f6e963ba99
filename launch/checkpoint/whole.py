"""A checkpoint without its run: whole tensors, and a copy that other hosts can take up."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from launch.checkpoint.folder import commit, prepare
from launch.checkpoint.manifest import find_damage, read_manifest
from launch.checkpoint.pieces import Contents, Piece, PieceReader, write_pieces
from launch.checkpoint.regions import Box
from launch.errors import UserError
from launch.runtime.run_dir import RunDir


def check_complete(checkpoint: Path) -> None:
    """Check a checkpoint that was named; `newest_complete` has checked what it returns.

    Raises:
        UserError: if it is none, or is damaged.
    """
    wrong = find_damage(checkpoint)
    if wrong:
        raise UserError(f"{checkpoint}: not a complete checkpoint: {wrong}; name another one")


def reshape(checkpoint: Path, run: RunDir) -> Path:
    """Copy a complete checkpoint into a new run folder, with every parameter in one piece.

    Any layout reads what any other has saved; the copy has a few large files in the place of some for
    each rank that saved it. Returns the new checkpoint's folder.

    Raises:
        UserError: if the folder holds a run.
    """
    if run.checkpoints.exists() or run.metrics.exists():
        raise UserError(f"{run.path}: holds a run already; name a new folder")
    manifest = read_manifest(checkpoint)
    reader = PieceReader(checkpoint, manifest)
    folder, contents = prepare(run, manifest["step"]), Contents()
    write_pieces(_whole_pieces(reader), folder, "state", contents)
    for name in manifest["files"]:
        if not name.startswith("state_"):
            shutil.copyfile(checkpoint / name, folder / name)
            contents.add_file(folder / name)
    kept = {key: value for key, value in manifest.items() if key not in ("tensors", "files")}
    commit(run, folder, kept, contents, keep=1)
    recipe = checkpoint.parent.parent / "recipe.yaml"
    if recipe.exists():
        shutil.copyfile(recipe, run.path / recipe.name)
    return run.checkpoints / f"step_{manifest['step']:08d}"


def _whole_pieces(reader: PieceReader) -> Iterator[Piece]:
    for name, entry in reader.tensors.items():
        shape = reader.shape(name)
        tensors = {kind: reader.whole(name, kind) for kind in entry["kinds"]}
        yield Piece(name, shape, Box((0,) * len(shape), shape), tensors)
