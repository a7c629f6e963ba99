"""From a recipe to an engine; shared by training, parity, benchmarks and traces.

    plan_run     recipe, number of ranks -> layout, DeepSpeed JSON, data; no process group, no GPU
    join_ranks   the ops that the JSON needs, the process group, the grid's groups
    build_engine (`engine.py`) the model on DeepSpeed's engine

`launch/train.py` handles the run folder and the checkpoint between the last two; `local_engine`
does all three.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.config.layout import Layout, plan_layout
from launch.config.load import recipe_from_dict
from launch.config.resolve import resolve
from launch.config.schema import GPTModel, Recipe
from launch.data.batch import Batch, ValidationSet
from launch.data.batches import Batches, Weights, load_batches, validation_set
from launch.data.prepare import Corpus
from launch.data.tokenizer import Tokenizer, load_tokenizer
from launch.errors import UserError
from launch.ops.builder import build_ops, ops_needed, use_private_cache

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

    from launch.runtime.process_group import RankInfo
    from models.parallel.topology import Topology


@dataclass(frozen=True)
class RunPlan:
    """All that is known about a run before its ranks connect. `ds_config` is the resolved JSON."""

    recipe: Recipe
    layout: Layout
    ds_config: dict[str, Any]
    corpus: Corpus
    batches: Batches

    def batch(self, step: int, data_rank: int = 0) -> Batch:
        """A data parallel rank's part of a step's global batch; steps count from 0."""
        return self.batches.rank_batch(step, self.layout, data_rank)

    def validation(self, data_rank: int = 0) -> ValidationSet:
        """A data parallel rank's part of the validation set."""
        train = self.recipe.train
        return validation_set(
            self.corpus.held_out,
            self.recipe.data.sequence_length,
            train.eval_batches * train.global_batch_size,
            train.micro_batch_size,
            data_rank,
            self.layout.grid["data"],
            self.batches.separator,
        )


def plan_run(
    recipe: Recipe,
    world_size: int,
    say: Callable[[str], None] = print,
    weights: Weights | None = None,
) -> RunPlan:
    """Check a recipe against its ranks and its JSON, and prepare its data.

    Args:
        recipe: what to run.
        world_size: the number of ranks.
        say: receives lines to report to the user.
        weights: loss weights, as for `Batches`.

    Raises:
        UserError: if the recipe, the JSON, the ranks and the data do not fit together.
    """
    layout = plan_layout(recipe, world_size)
    ds_config = resolve(recipe, layout)
    use_private_cache()
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    check_model(recipe, ds_config, tokenizer)  # first, as to tokenise a large text takes hours
    corpus, batches = load_batches(recipe, say, weights, tokenizer)
    return RunPlan(recipe, layout, ds_config, corpus, batches)


def check_model(recipe: Recipe, ds_config: dict[str, Any], tokenizer: Tokenizer | None) -> None:
    """Check that the model can be built, and fits the tokenizer (if it is known) and the sequence.

    Raises:
        UserError: naming the key to change.
    """
    if isinstance(recipe.model, GPTModel):  # its context is checked with the recipe
        vocab, key = recipe.model.shape.vocab, "model.vocab"
        if recipe.model.init_from is not None:
            from launch.hf.initial_weights import check_init_from

            check_init_from(recipe.model)
    else:
        from launch.ds_json.view import training_dtype
        from launch.training.build_model import build_model
        from models.hf import most_positions

        model: Any = build_model(recipe, training_dtype(ds_config), "meta")
        config, sequence = model.model.config, recipe.data.sequence_length
        vocab, key = config.get_text_config().vocab_size, "model.changes.vocab_size"
        positions = most_positions(config)
        if positions is not None and sequence > positions:
            raise UserError(
                f"data.sequence_length: {sequence} is more than the {positions} positions that "
                f"{recipe.model.path} was made for; lower it, or set "
                f"model.changes.max_position_embeddings={sequence} to train more"
            )
    if tokenizer is not None and tokenizer.vocab_size > vocab:
        raise UserError(
            f"data.tokenizer: {recipe.data.tokenizer} has {tokenizer.vocab_size} tokens, and the "
            f"model's vocabulary is {vocab}; set {key} to at least the former"
        )


def join_ranks(plan: RunPlan, say: Callable[[str], None] = print) -> "tuple[RankInfo, Topology]":
    """`join_grid` for a run."""
    return join_grid(plan.recipe, plan.layout, plan.ds_config, say)


def join_grid(
    recipe: Recipe, layout: Layout, ds_config: dict[str, Any], say: Callable[[str], None] = print
) -> "tuple[RankInfo, Topology]":
    """Build the JSON's ops, connect the ranks, and create the grid's groups. Collective.

    Raises:
        UserError: if an op cannot be built, a swap folder cannot be made, or the ranks cannot connect.
    """
    from launch.deepspeed_patches.nvme_folder import make_parents
    from launch.runtime.process_group import init_process_group
    from launch.training.engine import make_topology

    make_parents(ds_config)  # before minutes of compiling
    build_ops(ops_needed(ds_config), say)
    return init_process_group(), make_topology(recipe, layout)


class LocalEngine(NamedTuple):
    """A rank's engine, with the plan and the topology it was built from."""

    plan: RunPlan
    ranks: "RankInfo"
    topology: "Topology"
    engine: "DeepSpeedEngine"

    @property
    def data_rank(self) -> int:
        """This rank's index among the ranks with the same weights."""
        return self.topology.get_data_parallel_rank()

    def batch(self, step: int) -> Batch:
        """This rank's part of a step's global batch; steps count from 0."""
        return self.plan.batch(step, self.data_rank)


@contextmanager
def local_engine(
    values: dict[str, Any], scratch: Path, weights: Weights | None = None
) -> Iterator[LocalEngine]:
    """The recipe's engine on one of the ranks started by `run_local_ranks`.

    Args:
        values: the recipe as plain values, which can be passed to another process.
        scratch: names the folder that a run with NVMe offload gets below its `nvme_path`.
        weights: loss weights, as for `Batches`.

    Raises:
        UserError: as `launch/train.py`.
    """
    from launch.runtime.process_group import prepare_environment

    prepare_environment()

    from launch.deepspeed_patches.nvme_folder import make_empty, remove, with_own_swap_folder

    plan = plan_run(recipe_from_dict(values), int(os.environ["WORLD_SIZE"]), weights=weights)
    ds_config, swap_folders = with_own_swap_folder(plan.ds_config, scratch)
    if os.environ["LOCAL_RANK"] == "0":
        make_empty(swap_folders)
    ranks, topology = join_ranks(plan)

    from launch.training.engine import build_engine

    engine = build_engine(plan.recipe, ds_config, ranks, topology)
    yield LocalEngine(plan, ranks, topology, engine)
    if ranks.local_rank == 0:
        remove(swap_folders)
