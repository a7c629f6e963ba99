"""For the fork server, which imports this last: what many tests' ranks would each make for themselves.

Imports, matplotlib's fonts, what DeepSpeed's config classes build on first use, and what it asks a process
of its own about the CPU.
"""

import importlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from launch.config.layout import plan_layout
from launch.config.load import load_recipe
from launch.config.resolve import resolve
from launch.paths import ROOT
from launch.runtime.process_group import schedule_as_batch
from launch.training.metrics import draw_loss

for name in (
    "pytest", "tests.parity.faults.bench", "tests.ds_configs.training", "tests.recipes.shrink",
    "launch.train", "launch.checkpoint.load", "launch.checkpoint.resume", "launch.checkpoint.save",
    "launch.deepspeed_patches.cpu_adam", "launch.deepspeed_patches.nvme_folder",
    "launch.parity.layout_recorder", "launch.planner.dry_run", "launch.planner.fit_check",
    "launch.training.finalize", "launch.training.preemption",
    "datasets", "encodings.utf_8_sig", "numpy.ma", "numpy.ctypeslib", "rich.table",
    "deepspeed.comm.mori", "torch.profiler._cupti_monitor", "torch._subclasses.schema_check_mode",
    "torch.utils.serialization.config",
):  # fmt: skip
    importlib.import_module(name)

schedule_as_batch()  # and so for each rank

_recipe = load_recipe(ROOT / "recipes/gpt_tiny_zero2.yaml")
resolve(_recipe, plan_layout(_recipe, 1))
with TemporaryDirectory() as _folder:  # matplotlib finds its fonts
    _records = [{"step": s, "tokens": s, "loss": 1.0, "validation_loss": 1.0} for s in (1, 2)]
    draw_loss(_records, Path(_folder, "loss.png"), "warm")

_cpuinfo: Any = importlib.import_module("cpuinfo")
_cpu = _cpuinfo.get_cpu_info()
_cpuinfo.get_cpu_info = lambda: dict(_cpu)
