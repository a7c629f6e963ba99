"""Read weights tensor by tensor, or in slices: of a folder of safetensors, or of a run.

Only safetensors are read. The other format, pytorch_model.bin, is a pickle: to load one runs what
its author put into it.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from launch.checkpoint.held_state import WEIGHT
from launch.checkpoint.manifest import BUFFERS, MANIFEST, newest_complete, read_manifest
from launch.checkpoint.pieces import PieceReader
from launch.checkpoint.safetensors_io import INDEX
from launch.checkpoint.whole import check_complete
from launch.config.schema import GPTModel, Recipe
from launch.errors import UserError
from launch.hf.config import read_object
from launch.hf.tensors import Shape, check_shapes, our_shapes
from launch.runtime.run_dir import RunDir, newest_finished, read_settings

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class WeightFiles:
    """The tensors in a folder's model*.safetensors; nothing is read but headers until it is asked for.

    Each read opens its file anew: pages of a mapped file count as this process's memory until the
    file is closed, and would add up to the whole model.

    Raises:
        UserError: if there are no such files, or they are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, Shape] = {}
        self._dtypes: dict[str, str] = {}
        for file in self._files():
            try:
                with safe_open(file, "pt") as opened:
                    for name in opened.offset_keys():
                        part = opened.get_slice(name)
                        if name in self._file_of:
                            raise UserError(f"{file}: {name} is in {self._file_of[name].name} too")
                        self._file_of[name] = file
                        self.shapes[name] = tuple(part.get_shape())
                        self._dtypes[name] = part.get_dtype()
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a readable safetensors file: {error}") from None

    def _files(self) -> list[Path]:
        index = self.folder / INDEX
        if index.is_file():
            weight_map = read_object(index).get("weight_map")
            names = weight_map.values() if isinstance(weight_map, dict) else []
            files = sorted({str(name) for name in names})
            for name in files:
                # The index comes with the model: it must not lead out of the folder.
                if not re.fullmatch(r"[\w.-]+\.safetensors", name):
                    raise UserError(f"{index}: {name} is no file name of this folder")
                if not (self.folder / name).is_file():
                    raise UserError(f"{index}: {name} is missing")
            return [self.folder / name for name in files]
        found = sorted(self.folder.glob("model*.safetensors"))
        pickles = sorted(self.folder.glob("*.bin")) + sorted(self.folder.glob("*.pt*"))
        if not found and pickles:
            raise UserError(
                f"{pickles[0]}: a pickle, which can run code when it is loaded, and none is read; "
                "have its author publish model.safetensors"
            )
        if not found:
            raise UserError(f"{self.folder}: no model*.safetensors here")
        return found

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype.

        Raises:
            UserError: if it is none that weights have: of a quantized model, for example.
        """
        if self._dtypes[name] not in DTYPES:
            raise UserError(
                f"{self._file_of[name]}: {name} is of dtype {self._dtypes[name]}; only "
                f"{', '.join(DTYPES)} can be read"
            )
        return DTYPES[self._dtypes[name]]

    def use(self, name: str, function: Callable[[Any], None]) -> None:
        """Call `function` with safetensors' slice of a tensor: only what it indexes is read.

        What it indexes is gone when it returns: copy it.
        """
        with safe_open(self._file_of[name], "pt") as opened:
            function(opened.get_slice(name))

    def read(self, name: str) -> Tensor:
        """A whole tensor, in its dtype. Its numbers are pages of the file, read when they are used."""
        with safe_open(self._file_of[name], "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor


@dataclass(frozen=True)
class Weights:
    """The whole weights of a run, under canonical names and in model order.

    Attributes:
        recipe: what they were trained with.
        run: the run's folder.
        shapes: of every tensor.
        dtypes: of every tensor.
        tensors: reads them anew, one at a time.
    """

    recipe: Recipe
    run: Path
    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype]
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]


def weights_of(path: Path) -> Weights:
    """The weights of a checkpoint, or of a run: its final ones, or its newest checkpoint's.

    `path` may also be `runs/<recipe>`, for its newest finished run.

    Raises:
        UserError: if there are none, they are damaged, or not those of the run's model.
    """
    if (path / MANIFEST).is_file():
        check_complete(path)
        return _of_checkpoint(path, path.absolute().parent.parent)
    run = newest_finished(path)
    if not any(run.glob("model*.safetensors")):
        checkpoint, damaged = newest_complete(RunDir(run))
        if checkpoint is None:
            raise UserError(
                f"{run}: no final weights, and no complete checkpoint "
                f"({'; '.join(damaged) or 'none was saved'})"
            )
        return _of_checkpoint(checkpoint, run)
    recipe, files = read_settings(run), WeightFiles(run)
    shapes = _in_model_order(recipe, files.shapes, run)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in shapes:
            yield name, files.read(name)

    return Weights(recipe, run, shapes, {name: files.dtype(name) for name in shapes}, tensors)


def _of_checkpoint(checkpoint: Path, run: Path) -> Weights:
    """Its master weights in fp32, and the buffers of a model of family hf in their own dtypes."""
    recipe = read_settings(run)
    reader = PieceReader(checkpoint, read_manifest(checkpoint))
    buffers = load_file(checkpoint / BUFFERS) if (checkpoint / BUFFERS).is_file() else {}
    found = {name: reader.shape(name) for name in reader.tensors}
    found |= {name: tuple(buffer.shape) for name, buffer in buffers.items()}
    shapes = _in_model_order(recipe, found, checkpoint)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in shapes:
            yield name, buffers[name] if name in buffers else reader.whole(name, WEIGHT)

    dtypes = {name: buffers[name].dtype if name in buffers else torch.float32 for name in shapes}
    return Weights(recipe, run, shapes, dtypes, tensors)


def _in_model_order(recipe: Recipe, found: dict[str, Shape], where: Path) -> dict[str, Shape]:
    if not isinstance(recipe.model, GPTModel):
        return found
    shapes = our_shapes(recipe.model.shape)
    check_shapes(shapes, found, str(where))
    return shapes
