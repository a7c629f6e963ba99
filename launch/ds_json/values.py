"""Checks of single values: wrong for DeepSpeed, or wrong and taken by it all the same.

What DeepSpeed refuses is "wrong-value". What it takes without a look, and trips over or reads as
something else later, is "unchecked-value": `"dump_state": "false"` is true to it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from launch.ds_json import keys as ds_keys
from launch.ds_json.deepspeed_reader import in_words, quiet, refusal
from launch.ds_json.finding import Finding, error, shown
from launch.ds_json.view import dtype_name


def check_values(config: dict[str, Any]) -> Iterator[Finding]:
    """Findings about values whose kind is wrong, wherever they are."""
    yield from _blocks_and_scalars(config, ds_keys.tree(), "")
    yield from _models(config)


def _blocks_and_scalars(block: dict[str, Any], valid: ds_keys.Tree, path: str) -> Iterator[Finding]:
    for key, below in valid.items():
        here = f"{path}.{key}" if path else key
        if key not in block or block[key] == "auto" or here in ds_keys.models():
            continue
        value = block[key]
        if isinstance(below, dict):
            if isinstance(value, dict):
                yield from _blocks_and_scalars(value, below, here)
            else:
                yield from _no_object(here, value)
        elif (kind := ds_keys.KINDS.get(here)) and not is_kind(kind, value):
            yield _judged(here, value, kind)


def _no_object(path: str, value: Any) -> Iterator[Finding]:
    # Where DeepSpeed takes null for a block, it is as good as no block.
    if value is not None or refusal(_only(path, value)):
        yield _judged(path, value, "object {...}")


def _judged(path: str, value: Any, kind: str) -> Finding:
    article = "" if kind.startswith("one of") else "an " if kind.startswith("object") else "a "
    message = f"{shown(value)} should be {article}{kind}"
    if refusal(_only(path, value), keep=path):
        return error(path, "wrong-value", message)
    return error(path, "unchecked-value", f"{message}; DeepSpeed itself does not check that")


def _only(path: str, value: Any) -> dict[str, Any]:
    """A config that says nothing else."""
    for key in reversed(path.split(".")):
        value = {key: value}
    only: dict[str, Any] = value
    return only


def _models(config: dict[str, Any]) -> Iterator[Finding]:
    """Check blocks with the pydantic models with which DeepSpeed parses them."""
    for path, model in ds_keys.models().items():
        *parents, name = path.split(".")
        above: Any = config
        for part in parents:
            above = above.get(part)
            if not isinstance(above, dict):
                break
        if not isinstance(above, dict) or name not in above or above[name] == "auto":
            continue
        if path == "bfloat16" and config.get("bf16") is not None:
            continue  # DeepSpeed reads one of the two
        value = above[name]
        if path == "zero_optimization" and isinstance(value, bool):
            message = 'true or false is the oldest form; write {"stage": 1} or another stage'
            yield error(path, "old-form", message)
        elif not isinstance(value, dict):
            yield from _no_object(path, value)
        else:
            yield from _checked(path, model, _without_auto(value))


def _checked(path: str, model: Any, given: dict[str, Any]) -> Iterator[Finding]:
    from pydantic import ValidationError

    try:
        with quiet():
            model(**given)
    except ValidationError as problem:
        yield from _explain(path, problem)
    except Exception as problem:  # a validator of DeepSpeed's ends the check of all others
        found = []
        if len(given) > 1:
            found = [each for key in given for each in _checked(path, model, {key: given[key]})]
        if not found:
            where = ".".join([path, *given]) if len(given) == 1 else path
            found = [error(where, "wrong-value", in_words(problem))]
        yield from found


def _explain(path: str, problem: Any) -> Iterator[Finding]:
    for item in problem.errors():
        if item["type"] == "extra_forbidden":
            continue  # already reported by the walk over the keys, with the nearest name
        key = ".".join([path, *(str(part) for part in item["loc"])])
        message = item["msg"].replace("Value error, ", "").replace("Assertion failed, ", "")
        value = f", but it is {shown(item['input'])}" if item["loc"] else ""
        yield error(key, "wrong-value", message + value)


def _without_auto(block: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in block.items()
        if value != "auto"
    }


def ask_deepspeed(config: dict[str, Any], reported: set[str]) -> Iterator[Finding]:
    """What DeepSpeed refuses beyond all rules; `reported` holds the top-level keys with errors."""
    asked = {key: value for key, value in config.items() if key not in reported}
    whole_problem = refusal(asked)
    if whole_problem is None:
        return
    single = {key: problem for key in asked if (problem := refusal({key: asked[key]}))}
    for key, problem in single.items():
        yield error(key, "wrong-value", f"DeepSpeed refuses it: {in_words(problem)}")
    if not single:
        yield error("", "refused", f"DeepSpeed refuses the whole: {in_words(whole_problem)}")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    try:
        return not isinstance(value, bool) and math.isfinite(value)
    except TypeError:
        return False
    except OverflowError:  # an integer that no float can hold
        return True


def whole(value: Any) -> int | None:
    """A whole number, also written as 8.0, as an integer; None if it is none."""
    return int(value) if is_number(value) and value == int(value) else None


_KINDS: dict[str, Callable[[Any], bool]] = {
    "boolean": lambda v: v is None or isinstance(v, bool),  # null is false
    "text": lambda v: isinstance(v, str) and v != "",
    "positive integer": lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0,
    # DeepSpeed computes with batch sizes as they are, and 8.0 serves as well as 8.
    "positive whole number": lambda v: 0 < (whole(v) or 0) < 2**63,
    # Accelerate writes "steps_per_print": Infinity.
    "positive number": lambda v: (is_number(v) or v == math.inf) and v > 0,
    "number from 0": lambda v: is_number(v) and v >= 0,
    "dtype (bf16, fp16 or fp32)": lambda v: dtype_name(v) is not None,
    "16-bit dtype (bf16 or fp16)": lambda v: dtype_name(v) in ("bf16", "fp16"),
    "object {...}": lambda v: isinstance(v, dict),
    "list of names": lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
}


def is_kind(kind: str, value: Any) -> bool:
    """Whether a value is of one of the kinds that `keys.py` names."""
    if kind.endswith(" or null"):
        return value is None or is_kind(kind.removesuffix(" or null"), value)
    if kind.startswith("one of "):
        choices = kind.removeprefix("one of ").lower().split(", ")
        return isinstance(value, str) and value.lower() in choices
    return _KINDS[kind](value)
