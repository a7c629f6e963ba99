"""Restore an engine from a checkpoint, whatever layout saved it."""

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors import SafetensorError
from safetensors.torch import load_file

from launch.checkpoint.counters import set_counters
from launch.checkpoint.full_weights import persistent_buffers
from launch.checkpoint.held_state import WEIGHT, Run, Wanted, held_state
from launch.checkpoint.identity import same_ranks
from launch.checkpoint.manifest import BUFFERS, generators_file, read_manifest
from launch.checkpoint.pieces import PieceReader
from launch.deepspeed_patches.cpu_adam import count_powers
from launch.errors import UserError
from launch.runtime.process_group import RankInfo
from launch.runtime.rng import load_generator_states, seed_generators
from models.parallel.topology import Topology


def load(
    engine: DeepSpeedEngine,
    topology: Topology,
    ranks: RankInfo,
    checkpoint: Path,
    run_identity: dict[str, Any],
) -> None:
    """Restore the engine and random generators from `checkpoint`. Call `identity.check` first.

    Each rank reads the elements that it holds, and no others. On other ranks than saved it, generators
    are seeded anew, as there are no states for them.

    Raises:
        UserError: if a file cannot be read, or does not have what this model needs.
    """
    manifest = read_manifest(checkpoint)
    reader, counts = PieceReader(checkpoint, manifest), manifest["engine"]
    kinds = frozenset(kind for entry in reader.tensors.values() for kind in entry["kinds"])
    try:
        for runs in held_state(engine, topology, Wanted(kinds, counts["optimizer_step"])):
            for run in runs:
                _read(reader, run)
        if (checkpoint / BUFFERS).exists():
            saved = load_file(checkpoint / BUFFERS)
            for name, buffer in persistent_buffers(engine.module).items():
                buffer.copy_(saved[name])
        set_counters(engine, counts)
        count_powers(engine, counts["optimizer_step"])
        if same_ranks(manifest, run_identity):
            load_generator_states((checkpoint / generators_file(ranks.rank)).read_text())
        else:
            seed_generators(
                run_identity["recipe"]["train"]["seed"],
                topology.coordinates["pipeline"],
                topology.get_data_parallel_rank(),
                manifest["step"],
            )
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"--resume: {checkpoint} cannot be read ({str(error).splitlines()[0]}); remove it and "
            "resume from an earlier one"
        ) from error


def _read(reader: PieceReader, run: Run) -> None:
    if run.name not in reader.tensors or reader.shape(run.name) != run.cut.shape:
        raise KeyError(f"no {run.name} of shape {list(run.cut.shape)}")
    with torch.no_grad():
        for kind, flat in run.tensors.items():
            if kind != WEIGHT and kind not in reader.tensors[run.name]["kinds"]:
                flat.zero_()
                continue
            for box, view in run.cut.boxes(flat, run.start):
                reader.read(run.name, kind, box, view)
