"""What came of a row, as a line of JSON: what was measured, on what, and what it was compared with."""

import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launch.config.schema import Recipe
from launch.errors import UserError
from launch.perf.bench.equality import Equality
from launch.perf.bench.rows import Row
from launch.planner.model_size import model_size
from launch.runtime.run_dir import git

Line = dict[str, Any]
PACKAGES = ("torch", "deepspeed", "transformers", "megatron-core")


class Timing(NamedTuple):
    """How the steps of a benchmark are counted: those before the timed ones, and those that are timed."""

    warmup: int
    steps: int
    rounds: int


def flops_per_token(recipe: Recipe) -> tuple[float, float]:
    """FLOPs to train on one token: with full attention (`models.config.flops_per_token`), and causal.

    The causal count takes half of attention, which is linear in the sequence's length.
    """
    length = recipe.data.sequence_length
    data = recipe.data.model_copy(update={"sequence_length": 2 * length})
    _, full = model_size(recipe)
    _, doubled = model_size(recipe.model_copy(update={"data": data}))
    return full, full - (doubled - full) / 2


def surroundings() -> Line:
    """What a result depends on besides the row: packages, Python, commit and command."""
    found: Line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    commit = git("rev-parse", "--short=10", "HEAD")
    return {**found, "commit": commit and commit + changed, "command": shlex.join(sys.argv)}


def described(row: Row) -> Line:
    """What a row is, before it runs."""
    return {
        "row": row.name,
        "kind": row.kind,
        "recipe": row.recipe.name,
        "overrides": list(row.overrides),
        "ranks": row.ranks,
        "layout": row.layout.describe(),
        "micro_batch": row.layout.micro_batch,
        "tokens_per_step": row.recipe.train.global_batch_size * row.recipe.data.sequence_length,
        "trains": row.trains,
    }


def measured(row: Row, timing: Timing, turns: Sequence[Sequence[Line]]) -> Line:
    """What a row's turns measured; each turn has what its ranks wrote down, rank 0's first."""
    first = turns[0][0]
    until = timing.warmup + timing.steps
    # Ranks wait for each other in every step, so rank 0's times hold for all.
    seconds = [s for turn in turns for s in turn[0]["seconds"][timing.warmup : until]]
    middle = statistics.median(seconds)
    speed = described(row)["tokens_per_step"] / middle
    full, causal = flops_per_token(row.recipe)
    peak = first["peak_tflops"]

    def mfu(flops: float) -> float | None:
        return speed / row.ranks * flops / (peak * 1e12) if peak else None

    return {
        **timing._asdict(),
        "rounds": len(turns),
        "device": first["device"],
        "nccl": first["nccl"],
        "seconds_per_step": middle,
        "seconds_p10": quantile(seconds, 0.1),
        "seconds_p90": quantile(seconds, 0.9),
        "tokens_per_second": speed,
        "tokens_per_second_per_rank": speed / row.ranks,
        "mfu": mfu(full),
        "mfu_causal": mfu(causal),
        "flops_per_token": full,
        "flops_per_token_causal": causal,
        "peak_tflops": peak,
        "memory_gib": max(rank["memory_gib"] for turn in turns for rank in turn),
        "losses": first["losses"],
        "profile": [rank["profile"] for rank in turns[-1] if rank["profile"]],
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, interpolated."""
    return float(np.quantile(values, share))


def compared(equality: Equality | None, reason: str | None) -> Line:
    """Whether a row trained the same; None with the reason where nothing could be compared."""
    return {
        "equal": None if equality is None else equality.equal,
        "loss_share_of_bound": None if equality is None else equality.share,
        "loss_worst_step": None if equality is None else equality.step,
        "not_compared": reason,
    }


def as_json(line: Line) -> str:
    """A line of a file. Infinite and undefined numbers, which JSON has not, become null."""
    return json.dumps(_finite(line), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    infinite = isinstance(value, float) and value - value != 0.0
    return None if infinite else value


def read_lines(files: Iterable[Path]) -> list[Line]:
    """The rows of files that `--out` has written.

    Raises:
        UserError: for a file that cannot be read, or that holds something else.
    """
    found = []
    for file in files:
        try:
            text = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: not readable: {error}") from None
        for number, line in enumerate(text.splitlines(), 1):
            try:
                each = json.loads(line)
                found.append({**each, "row": each["row"], "kind": each["kind"]})
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{file}, line {number}: not a row of scripts/bench.py --out"
                ) from None
    return found


class ResultFile:
    """The file of `--out`: what it held before, and this benchmark's rows as far as they are known.

    Args:
        file: one JSON object a line; None: nothing is written.

    Raises:
        UserError: if the file cannot be written, or holds something else.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.before = read_lines([file]) if file is not None and file.exists() else []
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                self.write([])
            except OSError as error:
                raise UserError(f"--out: {file}: {error.strerror}") from None

    def write(self, lines: Iterable[Line]) -> None:
        """Write this benchmark's rows after the earlier ones."""
        if self.file is None:
            return
        new = self.file.with_name(self.file.name + ".new")
        new.write_text("".join(as_json(line) + "\n" for line in [*self.before, *lines]))
        new.replace(self.file)
