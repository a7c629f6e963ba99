"""Each workaround for DeepSpeed that changes numbers, taken out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from launch.config.load import recipe_from_dict
from launch.config.schema import Recipe
from tests.parity.cases import Case
from tests.parity.faults.seeded import FEW_ROWS, LOSS_1, LOSS_2, NORM_1, WEIGHTS, Seeded
from tests.parity.hf_cases import SIZES, HFCase
from tests.parity.kinds import OFFLOAD, PP2, TP2
from tests.parity.planting import plant


def _without(name: str) -> None:
    from launch.training import engine

    plant(engine, name, lambda *arguments: None)


def step_taken_at_construction_not_undone() -> None:
    _without("undo_step_taken_at_construction")


def gradients_of_shards_not_marked() -> None:
    _without("mark_gradients")


def marks_of_stage_0_left_as_they_were() -> None:
    _without("count_each_parameter_once")


def norm_not_kept_by_stage_0() -> None:
    _without("keep_grad_norm")


def tied_gradients_not_summed_where_they_are() -> None:
    _without("sum_tied_gradients_where_they_are")


def plan_of_autotp_not_exposed() -> None:
    _without("expose_tp_plan")


def model_that_autotp_cuts_wrongly_let_through() -> None:
    _without("check_plan")


def tied_parameters_rounded() -> None:
    _without("keep_tied_parameters_in_their_dtype")


def hpz_let_through() -> None:
    from launch.training import setup

    right = vars(setup)["resolve"]

    def wrong(*arguments: Any) -> dict[str, Any]:
        found: dict[str, Any] = right(*arguments)
        found["zero_optimization"]["zero_hpz_partition_size"] = 2
        return found

    plant(setup, "resolve", wrong)


# bf16 with a bf16 copy of the weights at stage 0, which our own JSONs avoid.
BF16_COPY: dict[str, Any] = {
    "deepspeed.bf16.enabled": True,
    "deepspeed.torch_autocast.enabled": False,
    "deepspeed.data_types.grad_accum_dtype": "bf16",
}
AUTOCAST: dict[str, Any] = {
    "deepspeed.torch_autocast.enabled": True, "deepspeed.torch_autocast.dtype": "bfloat16"
}  # fmt: skip
SHARDED = HFCase("zero1", 2, "fp32", model="qwen3", tensor=2)


@dataclasses.dataclass(frozen=True)
class Apertus(HFCase):
    """A model that `check_plan` rejects: its plan leaves out the activation's learned parameters."""

    def recipe(self, folder: Path, changes: dict[str, Any] | None = None) -> Recipe:
        """As `HFCase.recipe`."""
        file = folder / "apertus.json"
        values = super().recipe(folder, changes).model_dump()
        file.write_text(json.dumps(SIZES | {"model_type": "apertus", "tie_word_embeddings": False}))
        values["model"]["path"] = str(file)
        return recipe_from_dict(values)


BOTH = (0, 1)
FAULTS = [
    Seeded(
        step_taken_at_construction_not_undone, Case("zero0", 1, overrides=(FEW_ROWS,)), LOSS_2,
        "weights before", r"embedding\.token\.weight", changes=BF16_COPY,
    ),
    Seeded(
        gradients_of_shards_not_marked, Case("zero0", 2, "bf16", overrides=(FEW_ROWS, TP2)), NORM_1,
        "grad norm", "grad norm", ranks=BOTH, changes=BF16_COPY,
        more=((HFCase("zero0", 2, "bf16", model="llama"), NORM_1),),
    ),
    Seeded(
        marks_of_stage_0_left_as_they_were, Case("zero0", 2, overrides=(FEW_ROWS, PP2)), NORM_1,
        "grad norm", "grad norm", ranks=BOTH,
        more=(
            (Case("zero0", 2, "bf16", overrides=(PP2,)), NORM_1),
            (Case("zero0", 4, overrides=(TP2, PP2)), NORM_1),
            (Case("zero0", 4, "bf16", overrides=(TP2, PP2)), NORM_1),
        ),
    ),
    Seeded(
        norm_not_kept_by_stage_0, Case("zero0", 1, overrides=(FEW_ROWS,)), NORM_1, "grad norm",
        "grad norm",
    ),
    Seeded(
        tied_gradients_not_summed_where_they_are,
        Case("zero1", 2, "bf16", overrides=(FEW_ROWS, PP2, *OFFLOAD)), NORM_1,
        "parameter gradients", r"embedding\.token\.weight", ranks=BOTH,
        more=((Case("zero1", 4, "bf16", overrides=(PP2, *OFFLOAD)), NORM_1),),
    ),
    Seeded(
        plan_of_autotp_not_exposed, SHARDED, NORM_1, "parameter gradients",
        r"model\.layers\.0\.self_attn\.[qk]_norm\.weight", ranks=BOTH,
    ),
    Seeded(
        model_that_autotp_cuts_wrongly_let_through, Apertus("zero1", 2), WEIGHTS,
        "parameter gradients", r"model\.layers\.0\.mlp\.act_fn\.\w+", ranks=BOTH, refused=True,
    ),
    Seeded(
        tied_parameters_rounded, HFCase("zero3", 2, model="wide", tensor=1), LOSS_1, "forward",
        r"model\.embed_tokens", "its output", ranks=BOTH, changes=AUTOCAST,
        missed="the embedding is off by less than autocast's own rounding; the loss is the first place",
    ),
    Seeded(
        hpz_let_through, Case("zero3", 4, overrides=(FEW_ROWS, TP2)), LOSS_1, "forward",
        r"embedding\.token", "its output", ranks=(0, 1, 2, 3),
    ),
]  # fmt: skip
