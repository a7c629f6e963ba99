"""The memory and speed of the usual ways to train a model, measured and predicted in one run."""

from collections.abc import Callable
from dataclasses import dataclass

from launch.config.layout import Layout, plan_layout
from launch.config.resolve import resolve
from launch.config.schema import GPTModel
from launch.errors import UserError
from launch.memory.estimate import GIB, StageMemory, estimate
from launch.memory.parts import WORKSPACES
from launch.perf.memory_measure import RankMemory, measure

BF16 = ("deepspeed.bf16.enabled=true",)
CHECKPOINT = "model.checkpoint_activations=true"


def _zero(name: str, *more: str) -> tuple[str, ...]:
    return (f"deepspeed.config=ds_configs/{name}.json", *more)


# Overrides of a recipe, and the fewest ranks. bf16, but for the first two; ZeRO-1 where stages or shards
# are compared, as a pipeline needs it.
METHODS: dict[str, tuple[int, tuple[str, ...]]] = {
    "standard training, fp32": (1, _zero("zero0_fp32", "deepspeed.bf16.enabled=false")),
    "activation checkpointing, fp32": (1, _zero("zero0_fp32", "deepspeed.bf16.enabled=false", CHECKPOINT)),
    "mixed precision": (1, _zero("zero0", "deepspeed.bf16.enabled=false")),
    "ZeRO-1": (1, _zero("zero1", *BF16)),
    "ZeRO-2": (1, _zero("zero2", *BF16)),
    "ZeRO-3": (1, _zero("zero3", *BF16)),
    "ZeRO-3, CPU offload": (1, _zero("zero3_offload_cpu", *BF16)),
    "tensor 2": (2, _zero("zero1", *BF16, "parallel.tensor=2")),
    "pipeline 2": (2, _zero("zero1", *BF16, "parallel.pipeline=2")),
    "naive layer split": (2, _zero("zero1", *BF16, "parallel.pipeline=2", "parallel.schedule=naive")),
    "hybrid: tensor 2, pipeline 2": (
        4, _zero("zero1", *BF16, "parallel.tensor=2", "parallel.pipeline=2")
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """One method: its fullest rank, measured and predicted, and tokens per second of all ranks."""

    name: str
    measured: RankMemory
    predicted: StageMemory
    layout: Layout
    tokens_per_second: float

    @property
    def measured_gib(self) -> float:
        """The peak that was measured."""
        return self.measured.peak / GIB

    @property
    def predicted_gib(self) -> float:
        """The peak that was predicted; a CPU has no workspaces of cuBLAS."""
        unseen = WORKSPACES if self.measured.device == "cpu" else 0
        return (self.predicted.parts.total - unseen) / GIB


def compare(
    config: str,
    overrides: list[str],
    ranks: int,
    steps: int,
    only: str = "",
    say: Callable[[str], None] = print,
) -> list[Compared]:
    """Measure each method that these ranks allow; those that do not compose are said and left out.

    Args:
        config: a recipe of family gpt.
        overrides: changes to it; `train.global_batch_size` is four micro batches a rank, unless changed.
        ranks: local ranks to start.
        steps: steps of each measurement.
        only: methods with this text in their name.
        say: receives lines to report to the user.

    Raises:
        UserError: for a recipe of another family, or if a rank failed.
    """
    from launch.config.load import load_recipe

    base = load_recipe(config, overrides)
    if not isinstance(base.model, GPTModel):
        raise UserError("model.family: memory is predicted for family gpt, and this is family hf")
    given = any(each.startswith("train.global_batch_size=") for each in overrides)
    batch = base.train.global_batch_size if given else 4 * ranks * base.train.micro_batch_size
    found = []
    for name, (fewest, changes) in METHODS.items():
        if fewest > ranks or ranks % fewest or only not in name:
            continue
        try:
            recipe = load_recipe(config, [*overrides, f"train.global_batch_size={batch}", *changes])
            layout = plan_layout(recipe, ranks)
            ds_config = resolve(recipe, layout)
        except UserError as error:
            say(f"left out: {name}: {error}")
            continue
        say(f"{name} on {ranks} ranks")
        measured = measure(recipe, ranks, steps)
        fullest = max(measured, key=lambda rank: rank.peak)
        seconds = max(rank.step_seconds for rank in measured)
        tokens = layout.global_batch * recipe.data.sequence_length
        predicted = estimate(recipe, layout, ds_config)
        found.append(Compared(name, fullest, predicted, layout, tokens / seconds))
    return found
