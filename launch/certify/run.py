"""Run compositions: each on its ranks, and then the reference, side by side as devices allow."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.certify.axes import Row, name, ranks
from launch.certify.compositions import CLIPS, recipe_values
from launch.config.load import recipe_from_dict
from launch.config.schema import Recipe
from launch.errors import UserError
from launch.ops.builder import build_ops
from launch.parity.run import TrainingRecord, plan_reference, run_layout
from launch.runtime.fork_server import run_ranks
from launch.training.setup import RunPlan

if TYPE_CHECKING:
    from launch.parity.compare import Difference

# What each kind of offload loads; a rank that needs none needs no compiler.
OPS = {
    "none": (),
    "optimizer": ("cpu_adam",),
    "all": ("cpu_adam",),
    "nvme": ("cpu_adam", "async_io"),
}
ERROR_LENGTH = 2000  # characters of a failure's text that are kept, of its end


class Outcome(NamedTuple):
    """What came of a composition.

    `status` is "holds", "differs" (past a tolerance), "fails" (it raised) or "not run". `share` is
    the worst difference as a share of its tolerance, and `worst` names it. `text` is the reason
    why it failed or was not run.
    """

    status: str
    share: float | None = None
    worst: str = ""
    seconds: float = 0.0
    text: str = ""


def run_rank(values: dict[str, Any], scratch: Path, uneven: bool) -> TrainingRecord:
    """`run_layout`, also in fp16 on a CPU, which DeepSpeed takes for one that cannot.

    torch computes fp16 on any CPU; what is above it (loss scale, casts, ZeRO) is the real thing.
    """
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        type(get_accelerator()).is_fp16_supported = lambda self: True
    return run_layout(values, scratch, uneven)


def plan_plain_reference(recipe: Recipe, uneven: bool) -> RunPlan:
    """The reference's run without activation checkpointing, whatever the recipe says."""
    values = recipe.model_dump()
    values["model"]["checkpoint_activations"] = False
    values["model"].pop("cpu_checkpointing", None)  # a transformers model has none
    return plan_reference(recipe_from_dict(values), uneven=uneven)


def differences(
    values: dict[str, Any], uneven: bool, layout: TrainingRecord
) -> tuple[list["Difference"], list[float]]:
    """Run the reference and compare; the worst comes last, and the reference's gradient norms.

    To be called in a process of its own: to build a model changes torch's global state.
    """
    from launch.parity.compare import compare, key_biases, tolerances_of
    from launch.parity.run import run_reference

    recipe = recipe_from_dict(values)
    plan = plan_plain_reference(recipe, uneven)
    reference = run_reference(plan)
    limits = tolerances_of(recipe, plan.ds_config)
    return compare(reference, layout, limits, key_biases(recipe)), reference.grad_norms


def run(row: Row, folder: Path, scratch: Path, env: dict[str, str]) -> Outcome:
    """Run one composition and judge it; never raises for what the ranks do.

    Args:
        row: a value for each axis.
        folder: holds the text; shared by all compositions.
        scratch: names the composition's swap folder.
        env: for its ranks: which GPUs are theirs.
    """
    started = time.perf_counter()
    values, uneven = recipe_values(row, folder), row["weights"] == "unequal"
    try:
        layout = run_ranks(run_rank, ranks(row), values, scratch, uneven, env=env, show=None)[0]
        found, norms = run_ranks(differences, 1, values, uneven, layout, env=env, show=None)[0]
    except Exception as error:
        text = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
        return Outcome("fails", seconds=time.perf_counter() - started, text=text[-ERROR_LENGTH:])
    worst, seconds = found[-1], time.perf_counter() - started
    where = f"{worst.quantity}, {worst.where}"
    if not _clips_as_named(row["clip"], norms):
        text = f"clip {row['clip']} is not what the gradient norms make it: {norms}"
        return Outcome("fails", worst.share, where, seconds, text)
    return Outcome("differs" if worst.past else "holds", worst.share, where, seconds)


def _clips_as_named(clip: str, norms: list[float]) -> bool:
    """Whether clipping does at every step what the axis says; else nothing of it is shown."""
    clipped = [norm > CLIPS[clip] for norm in norms]
    return clip == "off" or (all(clipped) if clip == "binding" else not any(clipped))


class Devices:
    """The GPUs, each lent to a few compositions at a time; without GPUs, nothing to wait for.

    The models are so small that a GPU waits for its process most of the time.
    """

    def __init__(self, gpus: list[str], share: int = 1) -> None:
        self._free = dict.fromkeys(gpus, share)
        self._returned = threading.Condition()

    @classmethod
    def of_this_machine(cls, jobs: int | None = None) -> "Devices":
        """Those that CUDA_VISIBLE_DEVICES shows, each shared by as many as `jobs` at once ask for."""
        import torch

        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = torch.cuda.device_count()
        names = shown.split(",")[:count] if shown else [str(index) for index in range(count)]
        return cls(names, -(-(jobs or 1) // max(1, count)))

    def __len__(self) -> int:
        return len(self._free)

    def have(self, count: int) -> bool:
        """Whether there are as many, lent or not."""
        return not self._free or count <= len(self._free)

    @contextmanager
    def lent(self, count: int) -> Iterator[dict[str, str]]:
        """Wait for `count` GPUs, the least used ones; yield the environment that shows them alone."""
        if not self._free:
            yield {}
            return
        with self._returned:
            self._returned.wait_for(lambda: sum(map(bool, self._free.values())) >= count)
            mine = sorted(self._free, key=lambda gpu: -self._free[gpu])[:count]
            for gpu in mine:
                self._free[gpu] -= 1
        try:
            yield {"CUDA_VISIBLE_DEVICES": ",".join(mine)}
        finally:
            with self._returned:
                for gpu in mine:
                    self._free[gpu] += 1
                self._returned.notify_all()


def run_all(
    rows: list[Row],
    folder: Path,
    jobs: int,
    devices: Devices,
    done: Callable[[Row, Outcome], None],
    say: Callable[[str], None] = print,
) -> None:
    """Run compositions, up to `jobs` at once, and hand over each outcome as it comes.

    Args:
        rows: what to run; those of most ranks are started first, as they wait longest for GPUs.
        folder: for text, tokens and swapped weights.
        jobs: how many compositions run side by side, if there are GPUs for them.
        devices: the GPUs.
        done: called from this thread.
        say: is told what is built.
    """
    unbuilt = _build_ops(rows, say)
    for row in rows:
        recipe_values(row, folder)  # writes the text: once, and not in several threads
    waiting = []
    for row in rows:
        missing = [unbuilt[op] for op in OPS[row["offload"]] if op in unbuilt]
        if not devices.have(ranks(row)):
            missing.append(f"it needs {ranks(row)} GPUs, and there are {len(devices)}")
        if missing:
            done(row, Outcome("not run", text=missing[0]))
        else:
            waiting.append(row)

    def one(row: Row) -> Outcome:
        with devices.lent(ranks(row)) as env:
            return run(row, folder, folder / f"swap {name(row)}", env)

    pool = ThreadPoolExecutor(jobs)
    try:
        running = {pool.submit(one, row): row for row in sorted(waiting, key=ranks, reverse=True)}
        for each in as_completed(running):
            done(running[each], each.result())
    finally:  # without waiting, as a user who interrupts does not
        pool.shutdown(wait=False, cancel_futures=True)


def _build_ops(rows: list[Row], say: Callable[[str], None]) -> dict[str, str]:
    """Build the ops that rows need; of those that cannot be built, the reason."""
    unbuilt = {}
    for op in dict.fromkeys(op for row in rows for op in OPS[row["offload"]]):
        try:
            build_ops([op], say)
        except UserError as error:
            unbuilt[op] = str(error)
    return unbuilt
