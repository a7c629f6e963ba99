"""Tensors of a checkpoint as boxes in safetensors files, which any layout can read its own boxes from.

A rank writes `state_rank0003_000.safetensors` and so on; the manifest lists the boxes of each parameter.
safetensors holds numbers alone: to open a stranger's file cannot run code, as a pickle's would.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from launch.checkpoint.manifest import checksum, sync
from launch.checkpoint.regions import Box

FILE_BYTES = 2 * 2**30  # a file holds a little more; so much is in memory at once


@dataclass(frozen=True)
class Piece:
    """A box of one parameter, of `shape` in whole, with its tensors by kind ("weight", "exp_avg", ...)."""

    name: str
    shape: tuple[int, ...]
    box: Box
    tensors: Mapping[str, Tensor]


@dataclass
class Contents:
    """What a rank has written: part of a manifest. `files` are sizes and checksums by name."""

    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add_piece(self, piece: Piece, file: str) -> None:
        """List a piece of `file`."""
        entry = self.tensors.setdefault(
            piece.name, {"shape": piece.shape, "kinds": sorted(piece.tensors), "pieces": []}
        )
        entry["pieces"].append([file, piece.box.offsets, piece.box.sizes])

    def add_file(self, file: Path) -> None:
        """List a file that is complete, and force it onto the disk."""
        sync(file)
        self.files[file.name] = {"bytes": file.stat().st_size, "sha256": checksum(file)}

    def merge(self, other: "Contents") -> None:
        """Add another rank's."""
        self.files |= other.files
        for name, entry in other.tensors.items():
            if name in self.tensors:
                self.tensors[name]["pieces"] += entry["pieces"]
            else:
                self.tensors[name] = entry

    def missing(self) -> str | None:
        """The first parameter of which not every element is listed once; None if there is none."""
        for name, entry in self.tensors.items():
            listed = sum(Box(tuple(o), tuple(s)).numel for _, o, s in entry["pieces"])
            whole = Box((), tuple(entry["shape"])).numel
            if listed != whole:
                return f"{name}: {listed} of {whole} elements"
        return None


def write_pieces(pieces: Iterable[Piece], folder: Path, stem: str, into: Contents) -> None:
    """Write pieces, whose tensors are in memory, to files named `stem`_000.safetensors and so on.

    Raises:
        OSError, safetensors.SafetensorError: if the disk is full or fails.
    """
    waiting: dict[str, Tensor] = {}
    size = number = 0

    def flush() -> None:
        nonlocal size, number
        if waiting:
            file = folder / f"{stem}_{number:03d}.safetensors"
            save_file(waiting, file)
            into.add_file(file)
            waiting.clear()
            size, number = 0, number + 1

    for piece in pieces:
        into.add_piece(piece, f"{stem}_{number:03d}.safetensors")
        for kind, tensor in piece.tensors.items():
            waiting[_key(piece.name, kind, piece.box.offsets)] = tensor
            size += tensor.nbytes
        if size >= FILE_BYTES:
            flush()
    flush()


def _key(name: str, kind: str, offsets: Iterable[int]) -> str:
    return f"{name} {kind} {','.join(map(str, offsets))}"


class PieceReader:
    """Reads boxes of a checkpoint's parameters, whatever boxes it was saved in."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.tensors = folder, manifest["tensors"]
        self.open_files: dict[str, Any] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole parameter's shape."""
        return tuple(self.tensors[name]["shape"])

    def read(self, name: str, kind: str, box: Box, target: Tensor) -> None:
        """Copy a box of a parameter to `target`, of the box's sizes. Reads those elements alone.

        Raises:
            KeyError: if the checkpoint has no such parameter or kind.
        """
        found = 0
        for file, offsets, sizes in self.tensors[name]["pieces"]:
            piece = Box(tuple(offsets), tuple(sizes))
            common = piece.intersection(box)
            if common is None:
                continue
            stored = self._file(file).get_slice(_key(name, kind, piece.offsets))
            part = stored[common.within(piece)] if piece.sizes else self._scalar(file, name, kind)
            target[common.within(box)].copy_(part)
            found += common.numel
        if found != box.numel:
            raise KeyError(f"{name}: {found} of the {box.numel} elements of {box} are there")

    def whole(self, name: str, kind: str) -> Tensor:
        """A whole parameter (or moment) in memory, in fp32."""
        shape = self.shape(name)
        target = torch.empty(shape)
        self.read(name, kind, Box((0,) * len(shape), shape), target)
        return target

    def _file(self, name: str) -> Any:
        if name not in self.open_files:
            if len(self.open_files) > 64:
                self.open_files.clear()
            self.open_files[name] = safe_open(self.folder / name, framework="pt")
        return self.open_files[name]

    def _scalar(self, file: str, name: str, kind: str) -> Tensor:
        tensor: Tensor = self._file(file).get_tensor(_key(name, kind, ()))
        return tensor
