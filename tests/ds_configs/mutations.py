"""Configs for property tests: those of this repository, with something changed."""

import copy
import math
from typing import Any

from hypothesis import strategies as st

from launch.ds_json import keys as ds_keys
from launch.ds_json.strict_json import load_json
from launch.paths import ROOT

FILES = [
    *sorted((ROOT / "ds_configs").glob("*.json")),
    *sorted((ROOT / "ds_configs" / "hf").glob("*.json")),
    *sorted((ROOT / "tests" / "ds_configs" / "published").glob("*.json")),
]
SEEDS = [load_json(file) for file in FILES]


def _paths(tree: ds_keys.Tree, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, below in tree.items():
        found += [(*above, key), *_paths(below or {}, (*above, key))]
    return found


_PARAMETERS = (
    "lr", "betas", "eps", "weight_decay", "adam_w_mode", "torch_adam", "amsgrad", "momentum",
    "max_grad_norm", "ns_method", "fused", "foreach", "max_coeff", "nesterov",
)  # fmt: skip
_SCHEDULE = (
    "warmup_num_steps", "warmup_max_lr", "warmup_min_lr", "warmup_type", "total_num_steps",
    "cycle_min_lr", "cycle_max_lr", "step_size", "milestones", "gamma", "warmup_num_step",
)  # fmt: skip
KNOWN = [
    *_paths(ds_keys.tree()),
    *(("optimizer", "params", name) for name in _PARAMETERS),
    *(("scheduler", "params", name) for name in _SCHEDULE),
]
# Values that some key takes, or almost.
PLAUSIBLE: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, 8, 0.5, 1e-8, 8.0, 1e9, "auto", "cpu", "nvme", "none", "true",
    "bf16", "fp16", "fp32", "torch.float16", "float16", "BF16", "single", "sum", "Mean", "warn",
    "Ignore", "Adam", "AdamW", "Lion", "Lamb", "Adagrad", "Muon", "SGD", "sgd", "RAdam", "AdamX",
    "WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest", "StepLR",
    "CosineAnnealingLR", "LRScheduler", "debug", "FAST", "replica", [0.9, 0.95], [0.9], [], {}, "",
    {"device": "cpu"}, {"enabled": True}, {"enabled": "auto"}, {"lr": 1e-3}, {"type": "StepLR"},
    {"pipeline_stage": True}, {"classes": ["Block"]}, [1, [2]], ["a"],
]  # fmt: skip
EXTREME: list[Any] = [
    math.inf, -math.inf, math.nan, 10**400, -(10**400), 1e308, 2**63, "\ud800", "a\nb",
]  # fmt: skip
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8), below, max_size=3)
    ),
    max_leaves=6,
)
VALUES = st.one_of(st.sampled_from(PLAUSIBLE), st.sampled_from(EXTREME), ANYTHING)


@st.composite
def mutated(draw: st.DrawFn, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """One of the seeds after one to four changes."""
    config: dict[str, Any] = copy.deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        change = draw(
            st.sampled_from(["set", "set", "replace", "replace", "remove", "add", "move"])
        )
        if change == "set":
            set_at(config, draw(st.sampled_from(KNOWN)), copy.deepcopy(draw(VALUES)))
            continue
        places = _places(config)
        if not places:
            break
        block, key = draw(st.sampled_from(places))
        if change == "replace":
            block[key] = copy.deepcopy(draw(VALUES))
        elif change == "remove":
            del block[key]
        elif change == "add":
            block[draw(st.sampled_from(["_comment", "//", "typo", ""]) | st.text(max_size=8))] = (
                copy.deepcopy(draw(VALUES))
            )
        else:
            target, _ = draw(st.sampled_from(places))
            moved = block.pop(key)
            if not _holds(moved, target):
                target[key] = moved
    return config


def set_at(config: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Put a value at a path, through whatever is in the way."""
    *parents, last = path
    block = config
    for name in parents:
        if not isinstance(block.get(name), dict):
            block[name] = {}
        block = block[name]
    block[last] = value


def _places(block: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    found = []
    for key, value in block.items():
        found.append((block, key))
        if isinstance(value, dict):
            found += _places(value)
    return found


def _holds(value: Any, block: dict[str, Any]) -> bool:
    """Whether a block lies in a value that is to be moved into it."""
    if value is block:
        return True
    return isinstance(value, dict) and any(_holds(below, block) for below in value.values())
