"""Raw DeepSpeed shows what `launch/deepspeed_patches/speed/bf16_optimizer.py` works around."""

from typing import Any

import pytest

from tests.deepspeed_patches.raw import copies_to_fp32, initialize, operations, repaired
from tests.ranks import run_ranks

TWO_MICRO_BATCHES: dict[str, Any] = {
    "bf16": {"enabled": True, "immediate_grad_update": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {"stage": 1},
    "gradient_accumulation_steps": 2,
}


def two_steps(repair: bool) -> tuple[int, int, Any]:
    """How many gradients are copied to fp32, and sums set to zero; and the weights after two steps.

    A step has two micro batches. In the second step, the last rank does not use the layer that it updates.
    """
    import torch
    import torch.distributed as dist
    from torch import nn

    from launch.deepspeed_patches.speed.bf16_optimizer import add_gradients_without_a_copy

    torch.manual_seed(0)

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.at_first = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, inputs: torch.Tensor, both: bool) -> torch.Tensor:
            hidden = self.always(inputs)
            loss: torch.Tensor = (self.at_first(hidden) if both else hidden).square().sum()
            return loss

    engine = initialize(Layers(), TWO_MICRO_BATCHES)
    if repair:
        add_gradients_without_a_copy(engine)
    flat = {group.data_ptr() for group in engine.optimizer.fp32_groups_gradients_flat}
    widened = zeroed = 0
    for micro_batch in range(4):
        both = micro_batch < 2 or dist.get_rank() < dist.get_world_size() - 1
        loss = engine(torch.randn(1, 4, dtype=torch.bfloat16), both)
        with operations() as backward_pass:
            engine.backward(loss)
        with operations() as step:
            engine.step()
        widened += copies_to_fp32(backward_pass)
        zeroed += sum(
            name == "zero_" and tensors[0].data_ptr() in flat for name, tensors, _ in step
        )
    groups = engine.optimizer.fp32_groups_flat_partition
    return widened, zeroed, [group.tolist() for group in groups]


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_gradient_is_copied_before_it_is_added(ranks: int) -> None:
    raw = run_ranks(two_steps, ranks, False)
    repaired_ranks = run_ranks(two_steps, ranks, True)
    said = repaired("speed/bf16_optimizer.add_gradients_without_a_copy")
    for rank, (before, after) in enumerate(zip(raw, repaired_ranks, strict=True)):
        assert before[0] - after[0] == 2 * (4 + (4 if rank < ranks - 1 else 2)), said
        assert before[1] == 2 * 2 and after[1] == 0, said
        assert after[2] == before[2]


def sums_before_the_step(repair: bool) -> tuple[list[float], int]:
    """The fp32 sums of gradients that the step gets, and the most elements that were copied at once."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from launch.deepspeed_patches.speed import bf16_optimizer

    torch.manual_seed(0)
    engine = initialize(nn.Linear(4, 5, bias=False), TWO_MICRO_BATCHES)
    (sums,) = engine.optimizer.fp32_groups_gradients_flat
    if repair:
        bf16_optimizer.PIECE = 3
        bf16_optimizer.reduce_sums_in_pieces(engine)
    torch.manual_seed(1 + dist.get_rank())
    for _ in range(2):
        inputs = torch.randn(1, 4, dtype=torch.bfloat16)
        with operations() as asked:
            engine.backward(engine(inputs).square().sum())
        if engine.is_gradient_accumulation_boundary():
            break
        engine.step()
    copied = [
        tensors[0].numel()
        for name, tensors, _ in asked
        if name in ("_to_copy", "copy_") and tensors[0].dtype == torch.float32
    ]
    return sums.tolist(), max(copied, default=0)


def test_one_rank_rounds_its_gradients() -> None:
    import torch

    (raw,) = run_ranks(sums_before_the_step, 1, False)
    (exact,) = run_ranks(sums_before_the_step, 1, True)
    said = repaired("speed/bf16_optimizer.reduce_sums_in_pieces")
    assert torch.tensor(exact[0]).bfloat16().tolist() == raw[0], said
    assert exact[0] != raw[0], said


def test_sums_are_copied_as_a_whole() -> None:
    raw = run_ranks(sums_before_the_step, 2, False)
    pieces = run_ranks(sums_before_the_step, 2, True)
    said = repaired("speed/bf16_optimizer.reduce_sums_in_pieces")
    for (sums, most), (sums_of_pieces, piece) in zip(raw, pieces, strict=True):
        assert any(sums) and sums == sums_of_pieces
        assert most >= len(sums) > 3 >= piece, said
    assert raw[0][0] == raw[1][0]
