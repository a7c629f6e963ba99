"""The parity tests' models, batches and settings: small, and every path of DeepSpeed is taken."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.certify import compositions
from launch.certify.compositions import (
    CLIP,
    EPS,
    LEARNING_RATE,
    LONG,
    NO_CLIP,
    SHORT,
    STEPS,
    small_parts,
    write_text,
)
from launch.certify.run import plan_plain_reference
from launch.config.load import load_recipe
from launch.config.schema import Recipe
from launch.parity.compare import Difference, compare, key_biases, tolerances_of
from launch.parity.run import TrainingRecord, run_layout, run_reference
from launch.paths import ROOT
from tests.ranks import run_ranks

__all__ = ["CLIP", "NO_CLIP", "STEPS", "write_text"]
FAMILIES = {name: compositions.FAMILIES[name] for name in ("gpt2", "llama")}
DOCUMENTS = "data.document_mask=true"
EPS_KEY = "deepspeed.optimizer.params.eps"
ROWS_KEY = "train.global_batch_size"
LARGE_EPS = (f"{EPS_KEY}={EPS}",)


@dataclass(frozen=True)
class Case:
    """One layout of one model. `stem` names a tiny recipe, for example zero2_offload_cpu.

    `overrides` are key=value, and have the last word.
    """

    stem: str
    ranks: int
    precision: str = "fp32"  # or bf16
    family: str = "gpt2"
    micro_batch: int = 1
    clip: float = CLIP
    checkpoint_activations: bool = False
    overrides: tuple[str, ...] = ()
    uneven_weights: bool = False  # of the labels, as launch/parity/weights.py has them

    @property
    def name(self) -> str:
        """For pytest's list."""
        changed = [override.rpartition(".")[2] for override in self.overrides]
        weights = ["uneven"] if self.uneven_weights else []
        parts = [self.stem, str(self.ranks), self.precision, self.family, *changed, *weights]
        return "-".join(parts)

    @property
    def few_rows(self) -> dict[str, Any]:
        """Changes for `recipe`: two micro batches of each of two data parallel ranks, half of the usual."""
        return {ROWS_KEY: 4 * self.micro_batch}

    def recipe(self, folder: Path, changes: dict[str, Any] | None = None) -> Recipe:
        """The tiny recipe, made smaller still; `folder` is for its text and what it swaps."""
        file = ROOT / "recipes" / f"gpt_tiny_{self.stem}.yaml"
        zero = json.loads((ROOT / load_recipe(file).deepspeed["config"]).read_text())[
            "zero_optimization"
        ]
        values: dict[str, Any] = {f"model.{k}": v for k, v in FAMILIES[self.family].items()}
        values |= {
            "model.checkpoint_activations": self.checkpoint_activations,
            "data.source": write_text(folder, SHORT if DOCUMENTS in self.overrides else LONG),
            "data.tokenizer": "bytes",
            "data.sequence_length": 16,
            "data.cache_dir": folder / "cache",
            "train.steps": STEPS,
            ROWS_KEY: 8 * self.micro_batch,
            "train.micro_batch_size": self.micro_batch,
            "train.seed": 1234,
            "train.schedule.warmup_steps": 2,
            "train.schedule.decay": "cosine",
            "deepspeed.gradient_clipping": self.clip,
            "deepspeed.optimizer.params.lr": LEARNING_RATE,
        }
        # Stage 0 keeps fp32 weights and computes in bf16; the others keep a bf16 copy of them.
        block = "bf16" if zero["stage"] else "torch_autocast"
        values[f"deepspeed.{block}.enabled"] = self.precision == "bf16"
        if block == "torch_autocast":
            values["deepspeed.torch_autocast.dtype"] = "bfloat16"
        for key, value in small_parts(zero, folder).items():
            values[f"deepspeed.zero_optimization.{key}"] = value
        values |= changes or {}
        given = [f"{key}={value}" for key, value in values.items()]
        return load_recipe(file, [*given, *self.overrides])


def hundred_steps(family: str, ranks: int) -> Case:
    """Compiled ZeRO-3 without persistent parameters, in fp32: rounding stays within ten steps' bounds."""
    overrides = ("train.steps=100", "train.compile=true")
    return Case("zero3", ranks, family=family, clip=NO_CLIP, overrides=overrides)


class Workbench:
    """Runs cases and compares them; each reference is computed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._references: dict[str, TrainingRecord] = {}
        self._sound: dict[str, list[Difference]] = {}

    def reference(self, recipe: Recipe, uneven: bool) -> tuple[TrainingRecord, dict[str, Any]]:
        """The plain loop's trace and JSON, without activation checkpointing whatever the recipe says."""
        plan = plan_plain_reference(recipe, uneven)
        ds_config, values = plan.ds_config, plan.recipe.model_dump()
        parts = [values[key] for key in ("model", "data", "train")]
        parts += [
            ds_config.get(key) for key in ("bf16", "fp16", "torch_autocast", "gradient_clipping")
        ]
        key = json.dumps([*parts, ds_config["optimizer"]["params"], uneven], sort_keys=True)
        if key not in self._references:
            self._references[key] = run_reference(plan)
        return self._references[key], ds_config

    def sound(self, case: Case, changes: dict[str, Any] | None = None) -> list[Difference]:
        """`compare` without a fault, once a case."""
        key = f"{case} {changes}"
        if key not in self._sound:
            self._sound[key] = self.compare(case, changes=changes)
        return self._sound[key]

    def compare(
        self,
        case: Case,
        run: Callable[..., TrainingRecord] = run_layout,
        *before: Any,
        changes: dict[str, Any] | None = None,
    ) -> list[Difference]:
        """Call `run(*before, *arguments of run_layout)` on every rank; the worst comes last."""
        recipe = case.recipe(self.folder, changes)
        reference, ds_config = self.reference(recipe, case.uneven_weights)
        arguments = (recipe.model_dump(), self.folder / "swap", case.uneven_weights)
        layout = run_ranks(run, case.ranks, *before, *arguments)[0]
        clipped = [norm > case.clip for norm in reference.grad_norms]
        assert all(clipped) if case.clip == CLIP else not any(clipped)
        return compare(reference, layout, tolerances_of(recipe, ds_config), key_biases(recipe))
