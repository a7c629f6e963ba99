"""Linter rules for `optimizer`: what the class that DeepSpeed picks takes.

Torch's optimizers are made, with one parameter; DeepSpeed's own would be compiled, and are judged by
their signatures.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from launch.ds_json.deepspeed_reader import in_words, quiet
from launch.ds_json.finding import Finding, error, shown, warning
from launch.ds_json.values import is_kind, is_number
from launch.ds_json.view import Facts, block, switched_on
from launch.errors import nearest

_REMOVED = ("onebitadam", "zerooneadam", "onebitlamb")
_USUAL = ("Adam", "AdamW", "Lamb", "Lion", "Muon", "Adagrad", "SGD")


@dataclass(frozen=True)
class Chosen:
    """The class that DeepSpeed makes of an optimizer block.

    Attributes:
        name: for messages.
        made_of: the class.
        consumed: parameters that the engine takes out before it makes the class.
        given: parameters that the engine adds.
    """

    name: str
    made_of: Any
    consumed: frozenset[str] = frozenset()
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def valid(self) -> set[str]:
        """What may stand in optimizer.params."""
        names = list(inspect.signature(self.made_of).parameters)[1:]  # the first: the model's
        return set(names) - self.given.keys() | self.consumed


def chosen(facts: Facts) -> Chosen | None:
    """What `DeepSpeedEngine._configure_basic_optimizer` chooses; None if it is unknown here."""
    import torch
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    lower = facts.optimizer.lower()
    if facts.adam:
        return _adam_class(facts)
    if lower == "adagrad":
        if facts.offloaded:
            return Chosen("CPUAdagrad", DeepSpeedCPUAdagrad)
        return Chosen("torch's Adagrad", torch.optim.Adagrad)
    if lower == "lamb":
        return Chosen("FusedLamb", FusedLamb)
    if lower == "lion":
        return (
            Chosen("CPULion", DeepSpeedCPULion)
            if facts.offloaded
            else Chosen("FusedLion", FusedLion)
        )
    found = getattr(torch.optim, facts.optimizer, None)
    if lower != "muon" and inspect.isclass(found) and issubclass(found, torch.optim.Optimizer):
        return Chosen(f"torch's {facts.optimizer}", found)
    return None


def _adam_class(facts: Facts) -> Chosen:
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    consumed = frozenset({"torch_adam", "adam_w_mode", "fp32_optimizer_states"})
    if facts.params.get("torch_adam"):
        if facts.optimizer.lower() == "adamw" or facts.params.get("adam_w_mode", True):
            return Chosen("torch's AdamW", torch.optim.AdamW, consumed)
        return Chosen("torch's Adam", torch.optim.Adam, consumed)
    if facts.offloaded:
        return Chosen("CPUAdam", DeepSpeedCPUAdam, consumed, {"adamw_mode": True})
    return Chosen("FusedAdam", FusedAdam, consumed)


def _muon_parameters() -> set[str]:
    from deepspeed.runtime.engine import DeepSpeedEngine

    own = {"muon_lr", "adam_lr", "torch_adam", "adam_w_mode", "fp32_optimizer_states", "foreach"}
    return {*DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS, *own}


def optimizer_type(facts: Facts) -> Iterator[Finding]:
    """The optimizer's name, and whether ZeRO takes it."""
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    lower, key = facts.optimizer.lower(), "optimizer.type"
    given = facts.config.get("optimizer")
    if isinstance(given, dict) and given.get("type") is None:
        yield error(key, "no-effect", "without it DeepSpeed ignores the block; name one")
    if not lower:
        return
    if lower in _REMOVED:
        yield error(key, "removed", "1-bit optimizers have been removed; use AdamW")
        return
    found = chosen(facts)
    if found is None and lower not in DEEPSPEED_OPTIMIZERS:
        message = f"no optimizer {shown(facts.optimizer)}{nearest(facts.optimizer, _USUAL)}"
        yield error(key, "wrong-value", message)
        return
    tested = lower == "muon" or (found is not None and found.made_of in ZERO_SUPPORTED_OPTIMIZERS)
    if facts.stage and not tested and not facts.config.get("zero_allow_untested_optimizer"):
        message = f"ZeRO stops at {facts.optimizer}, unless this is true"
        yield error("zero_allow_untested_optimizer", "forbidden", message)
    if lower == "muon" and facts.stage == 3 and switched_on(facts.zero.get("reduce_scatter", True)):
        message = "Muon at ZeRO stage 3 needs false"
        yield error("zero_optimization.reduce_scatter", "forbidden", message)
    scale = block(facts.config, "fp16").get("loss_scale", 0)
    if lower == "lamb" and scale not in (0, "auto"):
        yield error("fp16.loss_scale", "forbidden", "Lamb needs dynamic loss scaling, which is 0")


def optimizer_parameters(facts: Facts) -> Iterator[Finding]:
    """Parameters that the optimizer's class does not take, and values that it does not."""
    if not facts.optimizer:
        return
    found, muon = chosen(facts), facts.optimizer.lower() == "muon"
    if "max_grad_norm" in facts.params:
        message = "no optimizer parameter; DeepSpeed stops; use gradient_clipping at the top level"
        yield error("optimizer.params.max_grad_norm", "forbidden", message)
    if found is None and not muon:
        return
    valid = found.valid if found else _muon_parameters()
    name = found.name if found else "Muon"
    refused = sorted(set(facts.params) - valid - {"max_grad_norm"})
    for key in refused:
        # Of DeepSpeed's optimizers, only Muon picks what it knows.
        fate = "takes no such parameter and stops" if found else "ignores this parameter"
        hint = nearest(key, valid)
        if facts.adam and key in _torch_adam_parameters():
            hint = "; it needs torch_adam: true"
        yield error(f"optimizer.params.{key}", "unknown-key", f"{name} {fate}{hint}")
    known = {
        key: value
        for key, value in facts.params.items()
        if key in valid and value != "auto" and key != "max_grad_norm"
    }
    if found and found.made_of.__module__.startswith("torch."):
        taken = {key: value for key, value in known.items() if key not in found.consumed}
        if problem := why_not(lambda: found.made_of([parameter()], **taken)):
            yield error("optimizer.params", "wrong-value", f"{name} stops: {problem}")
    else:
        yield from _own_values(name, known)


def _torch_adam_parameters() -> set[str]:
    import torch

    return Chosen("", torch.optim.AdamW).valid


def _own_values(name: str, params: dict[str, Any]) -> Iterator[Finding]:
    """Values for DeepSpeed's own optimizers, which compute with whatever they get."""
    for key, value in params.items():
        where, kind = f"optimizer.params.{key}", _PARAMETER_KINDS.get(key, "boolean")
        if key == "amsgrad" and value:
            if name == "CPUAdagrad":
                yield error(where, "no-effect", f"{name} has no AMSGrad; leave it out")
            else:
                yield error(where, "wrong-value", f"{name} has no AMSGrad and stops; leave it out")
        elif key == "ns_method" and value not in ("standard", "gram"):
            yield error(where, "wrong-value", f"{shown(value)} should be standard or gram")
        elif key != "ns_method" and not _fits(kind, value):
            yield error(where, "unchecked-value", f"{shown(value)} should be a {kind}")


_PARAMETER_KINDS = {
    **dict.fromkeys(
        ("lr", "eps", "weight_decay", "momentum", "muon_lr", "adam_lr", "max_coeff", "min_coeff"),
        "number from 0",
    ),
    "betas": "list of two numbers",
}


def _fits(kind: str, value: Any) -> bool:
    if kind == "list of two numbers":
        return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))
    return is_kind(kind, value)


def adam(facts: Facts) -> Iterator[Finding]:
    """What the two names for Adam mean, and what their parameters imply."""
    if not facts.adam:
        return
    params, lower = facts.params, facts.optimizer.lower()
    if lower == "adam" and "adam_w_mode" not in params:
        message = 'DeepSpeed\'s "Adam" is AdamW unless adam_w_mode is false; write "AdamW"'
        yield warning("optimizer.type", "adam-is-adamw", message)
    if lower == "adamw" and params.get("adam_w_mode") is False:
        message = 'ignored for "AdamW"; for plain Adam write "type": "Adam"'
        yield error("optimizer.params.adam_w_mode", "no-effect", message)
    missing = [name for name in ("lr", "betas", "eps", "weight_decay") if name not in params]
    if missing:
        decay = (
            ' (weight_decay: 0.01 with torch_adam, 0 without, so that "the same" config trains '
            "differently with offload)"
            if "weight_decay" in missing
            else ""
        )
        message = f"{', '.join(missing)} left to the library's defaults{decay}; write them"
        yield warning("optimizer.params", "implied-optimizer", message)
    if params.get("torch_adam") and facts.offloaded:
        message = (
            "with offload_optimizer the step runs in torch's AdamW on the CPU instead of "
            "DeepSpeed's faster CPUAdam; leave torch_adam out"
        )
        yield warning("optimizer.params.torch_adam", "offload-torch-adam", message)


def parameter() -> Any:
    """Something to optimize."""
    import torch

    return torch.nn.Parameter(torch.zeros(1))


def why_not(make: Callable[[], object]) -> str:
    """Why an optimizer or a schedule cannot be made; empty if it can."""
    from torch.optim import Optimizer

    # What torch wraps around it imports the compiler, which takes longer than the rest of the check.
    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    try:
        with quiet(), mock.patch.object(Optimizer, "add_param_group", add_param_group):
            make()
    except Exception as problem:  # it computes with values of any kind
        return in_words(problem)
    return ""


OPTIMIZER_RULES = (optimizer_type, optimizer_parameters, adam)
