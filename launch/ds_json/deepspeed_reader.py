"""DeepSpeed's own reader of a config, asked whether it takes one."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Judged elsewhere: the batch sizes by the number of ranks, which is not known here, as the sizes of
# a mesh; and GPUDirect Storage by the machine.
_BY_RANKS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "sequence_parallel_size", "data_parallel_size",
)  # fmt: skip


_LONGEST = 240


def refusal(config: dict[str, Any], keep: str = "") -> Exception | None:
    """The exception with which DeepSpeed refuses a config, or None if it takes it.

    Batch sizes are left out, but for the one called `keep`.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum

    # A copy, since DeepSpeed writes defaults into some blocks.
    left_out = set(_BY_RANKS) - {keep}
    asked = {key: copy.deepcopy(value) for key, value in config.items() if key not in left_out}
    asked.setdefault("train_micro_batch_size_per_gpu", 1)
    if isinstance(asked.get("aio"), dict):
        asked["aio"].pop("use_gds", None)
    try:
        with quiet():
            read = DeepSpeedConfig(asked)
            for dtype in (read.grad_accum_dtype, read.param_dtype, read.buffer_dtype):
                if dtype is not None:  # the engine reads them, by this
                    DtypeEnum(dtype)
    except Exception as problem:  # of any type: much is read without a check
        return problem
    return None


def in_words(problem: Exception) -> str:
    """An exception of DeepSpeed or torch in one line."""
    text = " ".join(str(problem).split())
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}..."
    # Their own checks say what is wrong; other exceptions need their type to be understood.
    spoken = type(problem).__name__ in ("AssertionError", "ValueError", "DeepSpeedConfigError")
    return text if spoken and text else f"{type(problem).__name__}: {text}"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log of DeepSpeed, whose warnings the rules report as findings."""
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel("CRITICAL")
    try:
        yield
    finally:
        logger.setLevel(level)
