"""The random generators used in training (mainly for dropout), as one state per rank."""

import json
import os
import random
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int, stage: int, data_rank: int, step: int = 0) -> None:
    """Seed this rank's generators, differently for each stage, data parallel rank, and step begun from.

    The ranks of a tensor group get the same seed; `models/parallel/rng.py` explains why.

    Call this after building the model, whose random draws differ between ZeRO stages.
    """
    entropy = [seed, stage, data_rank, *([step] if step else [])]
    mixed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)  # seeds the GPU too


def use_deterministic_kernels() -> None:
    """Have CUDA's kernels give the same bits each time. Call it before CUDA is used.

    Where torch has no such kernel for an operation, the operation raises an error that says so.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def generator_states() -> dict[str, Any]:
    """The states of all generators, as JSON takes them."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    on_gpu = torch.cuda.is_available()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, [int(key) for key in keys], position, has_gauss, cached],
        "torch": _hex(torch.get_rng_state()),
        "cuda": _hex(torch.cuda.get_rng_state()) if on_gpu else None,
    }


def load_generator_states(text: str) -> None:
    """Restore the states that `generator_states` returned, from JSON.

    Raises:
        ValueError: if that is not what the text is.
    """
    states = json.loads(text)
    try:
        version, numbers, gauss = states["python"]
        random.setstate((version, tuple(numbers), gauss))
        name, keys, *rest = states["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(_bytes(states["torch"]))
        if states["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(_bytes(states["cuda"]))
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"no states of random generators: {error}") from error


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
