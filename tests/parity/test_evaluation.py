"""Validation loss, next-token scores and generation are those of one device, in every layout.

And they leave no trace: what is trained after an evaluation is what would have been without it.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from launch.checkpoint.full_weights import canonical_names
from launch.config.layout import plan_layout
from launch.config.resolve import resolve
from launch.config.schema import Recipe
from launch.data.batches import validation_set
from launch.data.prepare import Corpus, prepare, tokens_needed
from launch.ds_json.view import compute_dtype
from launch.parity.compare import tolerances_of
from launch.training.build_model import build_model
from launch.training.sampling import sample
from tests.parity.cases import Case, Workbench
from tests.parity.kinds import KINDS, axes_of
from tests.ranks import run_ranks
from tests.selection import representatives

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 2
CONTEXT = 16
PROMPT = "abcdefgh abcd"  # two tokens short of the context, so that the window has to move
NEW_TOKENS = 6
TOKENS = [[5, 97, 98, 99, 32, 100, 101]]  # no multiple of two or four ranks


class Seen(NamedTuple):
    """What a rank has seen: losses of all steps; after the first, everything else."""

    losses: list[float]
    held_out: list[float]
    logits: "Tensor"
    text: str
    weights: "dict[str, Tensor]"


def _corpus(recipe: Recipe) -> Corpus:
    return prepare(recipe.data, tokens_needed=tokens_needed(recipe))


def _train_and_look(values: dict[str, Any], scratch: Path, counts: list[int]) -> Seen:
    """Run in each rank: steps, and between them an evaluation of each number of sequences."""
    from launch.checkpoint.full_weights import full_weights
    from launch.training.evaluate import evaluate, next_token_logits
    from launch.training.setup import local_engine
    from launch.training.train_step import train_step

    held_out, text, weights, logits = [], "", {}, torch.empty(0)
    with local_engine(values, scratch) as local:
        engine, layout, corpus = local.engine, local.plan.layout, local.plan.corpus
        data_rank = layout.grid.coordinates(local.ranks.rank)["data"]
        losses = []
        for step in range(STEPS):
            losses.append(train_step(engine, local.batch(step)).loss)
            if step or not counts:
                continue
            for count in counts:
                validation = validation_set(
                    corpus.held_out, CONTEXT, count,
                    layout.micro_batch, data_rank, layout.grid["data"],
                )  # fmt: skip
                held_out.append(evaluate(engine, validation))
            logits = next_token_logits(engine, torch.tensor(TOKENS), CONTEXT).float()
            text = sample(
                lambda tokens: next_token_logits(engine, tokens, CONTEXT),
                corpus.tokenizer, PROMPT, NEW_TOKENS, CONTEXT, torch.device("cpu"),
            )  # fmt: skip
            weights = {name: tensor.clone() for name, tensor in full_weights(engine)}
    return Seen(losses, held_out, logits, text, weights)


def _one_device(recipe: Recipe, dtype: torch.dtype, counts: list[int], layout: Seen) -> Seen:
    """The same of a plain model with the layout's weights."""
    corpus = _corpus(recipe)
    model = build_model(recipe, dtype, "cpu").eval()
    with torch.no_grad():
        for name, parameter in canonical_names(model).items():
            parameter.copy_(layout.weights[name])
    read = [torch.from_numpy(corpus.held_out.read(i, CONTEXT)) for i in range(max(counts))]
    rows, held_out = torch.stack(read), []
    with torch.no_grad():
        for n in counts:
            scores = model(rows[:n, :-1]).float().flatten(0, 1)
            held_out.append(float(F.cross_entropy(scores, rows[:n, 1:].flatten())))
        logits = model(torch.tensor(TOKENS)).float()
    text = sample(
        model, corpus.tokenizer, PROMPT, NEW_TOKENS, CONTEXT, torch.device("cpu")
    )  # fmt: skip
    return Seen([], held_out, logits, text, {})


# Micro batches of two: two whole ones and a smaller one, which two ranks cannot share evenly; and a
# smaller one alone, of which the second data parallel rank has nothing.
COUNTS = [5, 1, 4]
BF16 = ["tp2_dp2_zero3", "pp2_dp2", "pp2_tp2_sequence"]
CASES = {
    **{f"{kind}-fp32": case for kind, case in KINDS.items()},
    **{f"{kind}-bf16": dataclasses.replace(KINDS[kind], precision="bf16") for kind in BF16},
}


@pytest.mark.parametrize(
    "kind",
    representatives(
        CASES,
        lambda kind: axes_of(CASES[kind]) - {CASES[kind].stem},
        cost=lambda kind: CASES[kind].ranks,
    ),
)
def test_evaluation_is_that_of_one_device_and_leaves_no_trace(kind: str, bench: Workbench) -> None:
    case: Case = CASES[kind]
    recipe = case.recipe(bench.folder, case.few_rows)
    ds_config = resolve(recipe, plan_layout(recipe, case.ranks))
    dtype = compute_dtype(ds_config)
    arguments = (recipe.model_dump(), bench.folder / "swap")
    seen = run_ranks(_train_and_look, case.ranks, *arguments, COUNTS)
    expected = _one_device(recipe, dtype, COUNTS, seen[0])

    limits = tolerances_of(recipe, ds_config)
    assert seen[0].held_out == pytest.approx(expected.held_out, rel=limits.first_loss, abs=0)
    apart = float((seen[0].logits - expected.logits).norm() / expected.logits.norm())
    assert seen[0].logits.shape == expected.logits.shape
    assert apart <= limits.matrices
    if dtype is torch.float32:
        assert seen[0].text == expected.text
    for other in seen[1:]:
        assert other.held_out == seen[0].held_out
        assert torch.equal(other.logits, seen[0].logits)
        assert other.text == seen[0].text

    undisturbed = run_ranks(_train_and_look, case.ranks, *arguments, [])
    assert [rank.losses for rank in seen] == [rank.losses for rank in undisturbed]
