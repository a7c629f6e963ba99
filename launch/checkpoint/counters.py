"""The numbers of a run's state that are the same on every rank: counts, the schedule, the loss scale."""

from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from torch.optim.lr_scheduler import LambdaLR

from launch.checkpoint.held_state import steps_taken

_ENGINE = ("global_steps", "global_samples", "skipped_steps")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def counters(engine: DeepSpeedEngine) -> dict[str, Any]:
    """An engine's numbers, for a checkpoint's manifest."""
    scaler = _scaler(engine)
    return {
        **{name: int(getattr(engine, name)) for name in _ENGINE},
        "optimizer_step": steps_taken(engine),
        "schedule_step": engine.lr_scheduler.last_epoch,
        "loss_scale": {n: getattr(scaler, n) for n in _SCALE if hasattr(scaler, n)},
        "grad_scaler": _autocast_scaler(engine).state_dict() if _autocast_scaler(engine) else None,
    }


def set_counters(engine: DeepSpeedEngine, saved: dict[str, Any]) -> None:
    """Bring an engine to the numbers of a checkpoint, and to the next step's learning rate."""
    for name in _ENGINE:
        setattr(engine, name, saved[name])
    scaler = _scaler(engine)
    for name, value in saved["loss_scale"].items():
        if hasattr(scaler, name):  # not if the precision has changed
            setattr(scaler, name, value)
    if saved["grad_scaler"] and _autocast_scaler(engine):
        _autocast_scaler(engine).load_state_dict(saved["grad_scaler"])
    schedule: LambdaLR = engine.lr_scheduler
    schedule.last_epoch = saved["schedule_step"]
    schedule._step_count = saved["schedule_step"] + 1
    # Computed anew: the saved rate is another one if the run now has more steps.
    rates = [
        base * factor(schedule.last_epoch)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def _scaler(engine: DeepSpeedEngine) -> Any:
    """What holds the loss scale of fp16; None without one."""
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def _autocast_scaler(engine: DeepSpeedEngine) -> Any:
    return getattr(engine.optimizer, "torch_autocast_gradscaler", None)
