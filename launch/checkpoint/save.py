"""Save a run's state so that any layout can go on from it; on the same ranks, bit for bit.

A rank writes the fp32 weights and the optimizer state that it holds, as boxes of whole parameters
(`regions.py`), and its random generators. The data has no state: the step determines the global batch.

A checkpoint appears whole or not at all:

    1  every rank writes its files to `.saving_<step>`, forces them onto the disk, and hashes them
    2  rank 0 collects what each has written, or why it could not
    3  it writes the manifest, and renames the folder to `step_<step>`; `latest` names it
    4  it renames old checkpoints to `.removing_<step>`, and removes those

So whatever is killed, and whenever, each folder `step_...` is complete.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from launch.checkpoint.counters import counters
from launch.checkpoint.folder import commit, discard, prepare, why
from launch.checkpoint.full_weights import persistent_buffers, whole_shapes
from launch.checkpoint.held_state import held_state
from launch.checkpoint.manifest import BUFFERS, FORMAT, STATE_BYTES, generators_file
from launch.checkpoint.pieces import Contents, Piece, write_pieces
from launch.config.schema import Checkpoint
from launch.deepspeed_patches.nvme_checkpoint import is_swapped
from launch.errors import UserError
from launch.runtime.console import say
from launch.runtime.process_group import TIMEOUT, RankInfo
from launch.runtime.rng import generator_states
from launch.runtime.run_dir import RunDir
from models.parallel.topology import Topology

# Ranks that have written their part wait for the others on a group of their own. Its time limit grows with
# what a rank writes: a large save on a slow disk must not run into the limit of training's collectives.
SLOWEST_BYTES_PER_SECOND = 20e6


class Saver:
    """Saves a run's checkpoints. Every rank has one, and calls its methods after the same steps.

    With `checkpoint.asynchronous`, `save` returns when the state has been copied to host memory, and a
    thread writes the files while training goes on; the next `save`, or `finish`, waits for it. A run that
    swaps to NVMe saves synchronously: its state does not fit into host memory.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        topology: Topology,
        ranks: RankInfo,
        run: RunDir,
        run_identity: dict[str, Any],
        settings: Checkpoint,
    ) -> None:
        self.engine, self.topology, self.ranks = engine, topology, ranks
        self.run, self.identity, self.keep = run, run_identity, settings.keep
        self.asynchronous = settings.asynchronous and not is_swapped(engine)
        self._group: dist.ProcessGroup | None = None
        self._staging: dict[tuple[str, str, tuple[int, ...]], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._defect: BaseException | None = None

    def save(self, step: int) -> None:
        """Write `checkpoints/step_<step>` and keep only the newest; `step` counts finished steps.

        Checkpoints of later steps are removed too: they are left over from before this run was resumed
        from an earlier one.

        Raises:
            UserError: if the disk is full or not writable, on every rank. Earlier checkpoints are not
                touched. Of an asynchronous save it is raised by the next `save` or `finish`.
        """
        self.finish()
        begun = time.perf_counter()
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self._patience())
        folder = self._on_main_rank(step, lambda: str(prepare(self.run, step)))
        self.finish()
        assert folder is not None
        copied = (self._copy(piece) for piece in _pieces(self.engine, self.topology))
        rest = self._rest()
        if self.asynchronous:
            staged = list(copied)
            self._thread = threading.Thread(
                target=self._in_background, args=(step, Path(folder), staged, rest)
            )
            self._thread.start()
        else:
            self._write_and_commit(step, Path(folder), copied, rest)
            self.finish()
        say(
            f"checkpoint of step {step}: training waited {time.perf_counter() - begun:.2f} s for it"
        )

    def finish(self) -> None:
        """Wait for the save that is under way, if there is one.

        Raises:
            UserError: if it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._defect:
            raise self._defect
        if self._failure:
            raise UserError(self._failure)

    def _patience(self) -> timedelta:
        """How long a rank waits for the slowest: training's time limit, and what a slow disk takes."""
        elements = sum(math.prod(shape) for shape in whole_shapes(self.engine.module).values())
        share = STATE_BYTES * elements / self.ranks.world_size
        return TIMEOUT + timedelta(seconds=share / SLOWEST_BYTES_PER_SECOND)

    def _copy(self, piece: Piece) -> Piece:
        """A piece in host memory, which training does not write to."""
        copies = {}
        for kind, tensor in piece.tensors.items():
            key = (piece.name, kind, piece.box.offsets)
            if not self.asynchronous:
                copies[kind] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
                continue
            if key not in self._staging:  # pinned memory is copied to fast, and allocated slowly
                self._staging[key] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=self.ranks.device.type == "cuda"
                )
            copies[kind] = self._staging[key].copy_(tensor)
        return Piece(piece.name, piece.shape, piece.box, copies)

    def _rest(self) -> dict[str, Any]:
        """What is saved beside the pieces."""
        buffers = persistent_buffers(self.engine.module) if self.ranks.is_main else {}
        return {
            "generators": generator_states(),
            "buffers": {n: b.to("cpu", copy=True).contiguous() for n, b in buffers.items()},
            "engine": counters(self.engine),
        }

    def _in_background(self, *work: Any) -> None:
        """Keep what `_write_and_commit` raises, for `finish`: a thread's error is printed and forgotten."""
        try:
            self._write_and_commit(*work)
        except BaseException as error:
            self._defect = error

    def _write_and_commit(
        self, step: int, folder: Path, pieces: Iterable[Piece], rest: dict[str, Any]
    ) -> None:
        """Write this rank's files; rank 0 makes a checkpoint of all. `_failure` says what went wrong."""
        contents, failure = Contents(), None
        rank = self.ranks.rank
        try:
            write_pieces(pieces, folder, f"state_rank{rank:04d}", contents)
            file = folder / generators_file(rank)
            file.write_text(json.dumps(rest["generators"]))
            contents.add_file(file)
            if rest["buffers"]:
                save_file(rest["buffers"], folder / BUFFERS)
                contents.add_file(folder / BUFFERS)
        except (OSError, SafetensorError) as error:
            failure = why(error, self.run, step)
        everyone: list[Any] = [None] * self.ranks.world_size
        dist.gather_object(
            (contents, failure), everyone if self.ranks.is_main else None, group=self._group
        )

        def conclude() -> None:
            failures = [text for _, text in everyone if text]
            if failures:
                discard(folder)
                raise UserError(failures[0])
            whole = Contents()
            for part, _ in everyone:
                whole.merge(part)
            manifest = {"format": FORMAT, "step": step, **self.identity, "engine": rest["engine"]}
            commit(self.run, folder, manifest, whole, self.keep)

        self._on_main_rank(step, conclude)

    def _on_main_rank(self, step: int, act: Callable[[], str | None]) -> str | None:
        """Rank 0's result on every rank, or its failure in `_failure`. On the savers' own group."""
        told: list[Any] = [None, None]
        if self.ranks.is_main:
            try:
                told[0] = act()
            except UserError as error:
                told[1] = str(error)
            except (OSError, SafetensorError) as error:
                told[1] = why(error, self.run, step)
        dist.broadcast_object_list(told, src=0, group=self._group)
        result: str | None = told[0]
        self._failure = told[1]
        return result


def _pieces(engine: DeepSpeedEngine, topology: Topology) -> Iterator[Piece]:
    """The boxes that this rank saves, as views of the state itself."""
    for runs in held_state(engine, topology):
        for run in runs:
            if not run.ours_to_save:
                continue
            kinds = list(run.tensors)
            split = [list(run.cut.boxes(run.tensors[kind], run.start)) for kind in kinds]
            for parts in zip(*split, strict=True):
                tensors = {kind: view for kind, (_, view) in zip(kinds, parts, strict=True)}
                yield Piece(run.name, run.cut.shape, parts[0][0], tensors)
