"""Unequal label weights, as in fine-tuning: the loss is not the mean of micro batch means."""

import numpy as np
import numpy.typing as npt

from launch.config.schema import Recipe
from launch.data.batches import Weights
from launch.errors import UserError

PARTS = 8  # runs of rows in a global batch: with 8 micro batches, each micro batch is one part
FEW = 3
FEWEST_ROWS = 3  # in fewer, there are steps in which no label counts


def uneven_weights(recipe: Recipe) -> Weights:
    """Loss weights that differ between micro batches and depend only on (seed, step).

    Of every four parts of the global batch, one has no label that counts, one has 3, one has all,
    and one weights each label between 0 and 2. The kinds rotate from step to step.

    Raises:
        UserError: for a global batch in which no label would count at some steps, and for chat.
    """
    if recipe.data.format == "chat":
        raise UserError(
            "data.format: the labels of chat count unequally already; leave --uneven-loss-weights out"
        )
    rows, length, seed = (
        recipe.train.global_batch_size,
        recipe.data.sequence_length,
        recipe.train.seed,
    )
    if rows < FEWEST_ROWS:
        raise UserError(
            f"train.global_batch_size: with {rows}, uneven loss weights leave steps in which no label "
            f"counts; use {FEWEST_ROWS} or more"
        )

    def weights(step: int) -> npt.NDArray[np.float32]:
        generator = np.random.default_rng([seed, step])
        found = np.zeros((rows, length), dtype=np.float32)
        for part in range(PARTS):
            mine = found[part * rows // PARTS : (part + 1) * rows // PARTS]
            kind = (part + step) % 4
            if kind == 1:
                mine.flat[generator.choice(mine.size, min(FEW, mine.size), replace=False)] = 1.0
            elif kind == 2:
                mine[:] = 1.0
            elif kind == 3:
                mine[:] = generator.uniform(0.0, 2.0, mine.shape)
        return found

    return weights
