"""Write safetensors of any size with one tensor in memory at a time, and folders as a whole.

safetensors' own `save_file` takes all tensors of a file at once. A file is a header that says where
each tensor lies (eight bytes of its length, then JSON), and the tensors' bytes.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from launch.checkpoint.safetensors_io import INDEX, SHARD_BYTES
from launch.errors import UserError
from launch.hf.tensors import Shape

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
Spec = tuple[Shape, torch.dtype]


class SafetensorsWriter:
    """One safetensors file whose tensors come one at a time, in any order. A context manager.

    Args:
        file: to create.
        specs: shape and dtype of every tensor that will come.
    """

    def __init__(self, file: Path, specs: dict[str, Spec]) -> None:
        self.specs, self.missing = specs, set(specs)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.offsets, end = {}, 0
        # Wide numbers first: a tensor has to begin at a multiple of its numbers' width.
        for name in sorted(specs, key=lambda n: -specs[n][1].itemsize):
            shape, dtype = specs[name]
            begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
            self.offsets[name] = begin
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.file = file.open("wb")
        self.file.write(len(text).to_bytes(8, "little") + text)
        self.start = self.file.tell()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, cast to the dtype that was announced.

        Raises:
            ValueError: if it was not announced, has another shape, or has been written.
        """
        shape, dtype = self.specs[name]
        if tuple(tensor.shape) != shape or name not in self.missing:
            raise ValueError(f"{name} {list(tensor.shape)} is not due in this file")
        self.missing.remove(name)
        self.file.seek(self.start + self.offsets[name])
        flat = tensor.detach().to("cpu", dtype).contiguous().flatten()
        self.file.write(flat.view(torch.uint8).numpy().data)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file.

        Raises:
            ValueError: if a tensor has not come.
        """
        self.file.close()
        if kind is None and self.missing:
            raise ValueError(f"{min(self.missing)} was not written")


def write_sharded(
    folder: Path,
    specs: dict[str, Spec],
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write model*.safetensors, `shard_bytes` per file, with an index if there are several."""
    plan = split_state_dict_into_shards_factory(
        {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in specs.items()},
        get_storage_size=lambda t: t.numel() * t.element_size(),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )  # fmt: skip
    with ExitStack() as opened:
        writers: dict[str, SafetensorsWriter] = {}
        writer_of: dict[str, SafetensorsWriter] = {}
        for file, names in plan.filename_to_tensors.items():
            part = {name: specs[name] for name in names}
            writers[file] = opened.enter_context(SafetensorsWriter(folder / file, part))
            writer_of |= dict.fromkeys(names, writers[file])
        for name, tensor in tensors:
            writer_of[name].write(name, tensor)
            del tensor  # before the next one is made
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def new_folder_at(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that gets its name at the end, and is removed if that fails.

    Raises:
        UserError: if `out` exists, or cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: it exists already; name a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UserError(f"{out}: cannot make it ({error.strerror})") from None
    try:
        yield folder
        mask = os.umask(0)
        os.umask(mask)
        folder.chmod(0o777 & ~mask)  # mkdtemp's are ours alone
        folder.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot write it ({error}); make room, and start again") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
