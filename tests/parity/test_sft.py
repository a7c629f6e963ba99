"""Fine-tuning equals training by hand, one conversation at a time on one device, in every layout.

The other side (`conversations.py`) has its own tokens, labels, loss and AdamW, and peft's adapters on a
model that transformers loads: a layout agrees only if its rows are packed without attention from one
conversation to the next, the right labels count, and the mean is over those of the whole global batch.
"""

from collections.abc import Callable
from typing import Any

import pytest

from launch.parity.run import TrainingRecord, run_layout
from tests.parity.cases import NO_CLIP, Workbench
from tests.parity.conversations import Trained
from tests.parity.faults.data import mean_of_means
from tests.parity.faults.sft import (
    adapters_not_scaled,
    attention_across_conversations,
    base_weights_trained_too,
    one_adapter_not_reduced,
    questions_count_too,
)
from tests.parity.kinds import PP2, SEQUENCE, TP2, axes_of
from tests.parity.sft_cases import SFTCase, apart, by_hand
from tests.ranks import run_ranks
from tests.selection import representatives


def case(stem: str, ranks: int, model: str, *overrides: str, **more: Any) -> SFTCase:
    return SFTCase(stem, ranks, model=model, overrides=overrides, clip=NO_CLIP, **more)


CASES = [
    case("zero0", 2, "gpt"),
    case("zero1", 2, "gpt"),
    case("zero2", 2, "gpt"),
    case("zero3", 4, "gpt"),
    case("zero1", 2, "gpt", TP2),
    case("zero1", 2, "gpt", PP2),
    case("zero1", 4, "gpt", PP2, TP2, SEQUENCE),
    case("zero2", 2, "hf", checkpoint_activations=True),
    case("zero3", 2, "hf"),
    case("zero0", 2, "lora"),
    case("zero1", 2, "lora"),
    case("zero2", 4, "lora"),
    case("zero3", 2, "lora", checkpoint_activations=True),
    case("zero2_offload_cpu", 2, "lora"),
    case("zero3_offload_cpu", 2, "lora"),
    case("zero3_offload_nvme", 2, "lora"),
]
# Adam turns the sign of what rounding leaves of a gradient: with EPS as large as it is here, it cannot.
BOUND = {"loss": 1e-6, "grad norm": 2e-6, "weights": 2e-6}


@pytest.fixture(scope="module")
def hand(bench: Workbench) -> Callable[[SFTCase], Trained]:
    """Training by hand, once a model."""
    found: dict[str, Trained] = {}

    def trained(case: SFTCase) -> Trained:
        if case.model not in found:
            found[case.model] = by_hand(case, bench.folder)
        return found[case.model]

    return trained


def kinds(each: SFTCase) -> set[object]:
    """The model, the stage, and the axes that are sharded."""
    return {each.model, each.stem[:5], *(axes_of(each) - {each.stem, each.precision})}


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize(
    "each",
    representatives(CASES, kinds, cost=lambda each: each.ranks),
    ids=lambda each: each.name,
)
def test_layout_equals_training_by_hand(
    each: SFTCase, bench: Workbench, hand: Callable[[SFTCase], Trained]
) -> None:
    values = each.recipe(bench.folder).model_dump()
    layout = run_ranks(run_layout, each.ranks, values, bench.folder / "swap")[0]
    found = apart(hand(each), layout)
    assert all(found[name] <= bound for name, bound in BOUND.items()), found
    assert hand(each).losses[-1] < hand(each).losses[0]


def faulty_layout(fault: Callable[[], None], *arguments: Any) -> TrainingRecord:
    """Run in each rank: plant the fault, then be a rank like any other."""
    fault()
    return run_layout(*arguments)


FAULTS = [
    pytest.param(mean_of_means, case("zero2", 2, "gpt"), "loss"),
    pytest.param(attention_across_conversations, case("zero2", 2, "hf"), "loss"),
    pytest.param(attention_across_conversations, case("zero1", 2, "gpt", PP2), "loss"),
    pytest.param(questions_count_too, case("zero2", 2, "gpt"), "loss"),
    pytest.param(one_adapter_not_reduced, case("zero3", 2, "lora"), "grad norm"),
    pytest.param(one_adapter_not_reduced, case("zero2", 2, "lora"), "grad norm"),
    pytest.param(adapters_not_scaled, case("zero2", 2, "lora"), "grad norm"),
    pytest.param(base_weights_trained_too, case("zero2", 2, "lora"), "grad norm"),
]


@pytest.mark.parametrize(
    ("fault", "each", "seen"),
    representatives(FAULTS, lambda fault, each, seen: {seen}),
    ids=lambda value: getattr(value, "name", getattr(value, "__name__", None)),
)
def test_training_by_hand_shows_the_fault(
    fault: Callable[[], None],
    each: SFTCase,
    seen: str,
    bench: Workbench,
    hand: Callable[[SFTCase], Trained],
) -> None:
    values = each.recipe(bench.folder).model_dump()
    layout = run_ranks(faulty_layout, each.ranks, fault, values, bench.folder / "swap")[0]
    assert apart(hand(each), layout)[seen] > 100 * BOUND[seen]


BF16 = [case(stem, 2, "lora", precision="bf16") for stem in ("zero1", "zero2", "zero3")]


@pytest.mark.parametrize(
    "each", representatives(BF16, lambda each: {each.precision}), ids=lambda each: each.name
)
def test_adapters_in_bf16_equal_the_reference_of_parity(each: SFTCase, bench: Workbench) -> None:
    differences = bench.compare(each)
    assert not [d for d in differences if d.past]
    assert any("lora_B" in d.where for d in differences)
