"""The optimizer's state that DeepSpeed shows of each parameter group."""

from typing import Any

from tests.deepspeed_patches.raw import initialize, repaired
from tests.ranks import run_ranks


def groups_with_their_state() -> list[bool]:
    """Of two parameter groups, which have a first moment after a step at ZeRO-1."""
    import torch
    from deepspeed.utils import safe_get_full_optimizer_state

    model = torch.nn.Linear(4, 4)
    groups: list[dict[str, Any]] = [{"params": [model.weight]}, {"params": [model.bias]}]
    optimizer = torch.optim.AdamW(groups)
    engine = initialize(
        model,
        {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True},
        optimizer=optimizer,
    )
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    found = []
    for parameter in (model.weight, model.bias):
        try:
            found.append(safe_get_full_optimizer_state(parameter, "exp_avg") is not None)
        except ValueError:
            found.append(False)
    return found


def test_only_the_first_group_has_its_state() -> None:
    found = run_ranks(groups_with_their_state, 1)
    assert found == [[True, False]], repaired("optimizer_state.link_every_group")
