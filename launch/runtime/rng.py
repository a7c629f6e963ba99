"""The random generators used in training (mainly for dropout), as one state per rank."""

import random
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int, stage: int, data_rank: int) -> None:
    """Seed this rank's generators, differently for each stage and data parallel rank.

    The ranks of a tensor group get the same seed; `models/parallel/rng.py` explains why.

    Call this after building the model, whose random draws differ between ZeRO stages.
    """
    mixed = int(np.random.SeedSequence([seed, stage, data_rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)  # seeds the GPU too


def generator_states() -> dict[str, Any]:
    """The states of all generators, for saving."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_generator_states(states: dict[str, Any]) -> None:
    """Restore the states returned by `generator_states`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
