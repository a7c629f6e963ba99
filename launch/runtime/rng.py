"""The random generators that training draws from (dropout above all), as one state a rank."""

import random
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int, stage: int, data_rank: int) -> None:
    """Start every generator of this rank, apart from those of other stages and data parallel ranks.

    The ranks of a tensor group start alike: `models/parallel/rng.py` says why.

    Call it when the model is built: what that draws differs between ZeRO stages.
    """
    mixed = int(np.random.SeedSequence([seed, stage, data_rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)  # of the GPU too


def generator_states() -> dict[str, Any]:
    """Where each generator is, to be saved."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_generator_states(states: dict[str, Any]) -> None:
    """Put each generator back to where `generator_states` found it."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
