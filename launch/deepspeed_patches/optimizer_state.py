"""ZeRO-1 and 2: `safe_get_full_optimizer_state` fails for all parameter groups but the first."""

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


def link_every_group(engine: DeepSpeedEngine) -> None:
    """Link parameters with their optimizer state, in every parameter group. Call it after a step.

    Defect: ZeRO-1 and 2 step one group after the other, and link the states of all of them after the
        first, when the others have none: `safe_get_full_optimizer_state` raises for their parameters.
    Versions: DeepSpeed 0.19.8.
    Workaround: link them again. Does nothing at other stages.
    Proof: test_optimizer_state.py::test_only_the_first_group_has_its_state
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
