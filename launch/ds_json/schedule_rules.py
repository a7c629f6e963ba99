"""Linter rules for `scheduler`: the schedule is made, with an optimizer of a few numbers."""

import inspect
from collections.abc import Iterator
from typing import Any

from launch.ds_json.finding import Finding, error, shown
from launch.ds_json.optimizer_rules import parameter, why_not
from launch.ds_json.view import Facts, block
from launch.errors import nearest

_MOST_GROUPS = 100
# In place of what Hugging Face fills in.
_FILLED = {
    "warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 1, "total_num_steps": 100,
}  # fmt: skip


def scheduler(facts: Facts) -> Iterator[Finding]:
    """The schedule's name and parameters."""
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

    given = block(facts.config, "scheduler")
    kind, params = given.get("type"), given.get("params")
    if isinstance(facts.config.get("scheduler"), dict) and kind is None:
        message = "without it DeepSpeed ignores the block; name one"
        yield error("scheduler.type", "no-effect", message)
    if not isinstance(kind, str) or kind == "auto":
        return
    made_of = _class(kind)
    if made_of is None:
        message = f"no schedule {shown(kind)}{nearest(kind, VALID_LR_SCHEDULES)}"
        yield error("scheduler.type", "wrong-value", message)
        return
    if not isinstance(params, dict):
        message = f"{kind} needs an object {{...}} here, if an empty one; DeepSpeed stops"
        yield error("scheduler.params", "wrong-value", message)
        return
    names = list(inspect.signature(made_of).parameters)[1:]
    for key in params.keys() - set(names):
        message = f"{kind} takes no such parameter and stops{nearest(key, names)}"
        yield error(f"scheduler.params.{key}", "unknown-key", message)
    taken = {key: params[key] for key in params if key in names}
    autos = {key for key, value in taken.items() if value == "auto"}
    if autos <= _FILLED.keys():  # others are reported, and cannot be tried
        taken |= {key: _FILLED[key] for key in autos}
        if problem := why_not(lambda: made_of(_optimizer(taken), **taken)):
            yield error("scheduler.params", "wrong-value", f"{kind} stops: {problem}")


def _class(kind: str) -> Any:
    """The class of a schedule, as `DeepSpeedEngine._scheduler_from_config` finds it, or None."""
    import torch
    from deepspeed.runtime import lr_schedules

    if kind in lr_schedules.VALID_LR_SCHEDULES:
        return getattr(lr_schedules, kind)
    found = getattr(torch.optim.lr_scheduler, kind, None)
    is_class = isinstance(found, type) and issubclass(found, torch.optim.lr_scheduler.LRScheduler)
    return found if is_class else None


def _optimizer(params: dict[str, Any]) -> Any:
    """One with as many groups of parameters as the longest list of a schedule has entries."""
    import torch

    lists = [len(value) for value in params.values() if isinstance(value, list)]
    groups = min(max([1, *lists]), _MOST_GROUPS)
    return torch.optim.AdamW([{"params": [parameter()]} for _ in range(groups)])


SCHEDULE_RULES = (scheduler,)
