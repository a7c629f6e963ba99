"""Raw DeepSpeed at ZeRO stage 0 shows each defect that `launch/deepspeed_patches/stage0.py` works around.

A test here fails once DeepSpeed has repaired the defect; its message names the workaround to remove.
"""

from typing import Any

import pytest

from tests.deepspeed_patches.raw import TwoShards, initialize, repaired, start
from tests.ranks import run_ranks


def after_construction() -> tuple[list[float], float]:
    import torch

    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    engine = initialize(model, {"bf16": {"enabled": True}})
    steps = [float(state["step"]) for state in engine.optimizer.optimizer.state.values()]
    return steps, engine.optimizer.fp32_groups[0][0].item()


def test_optimizer_steps_at_construction() -> None:
    steps, weight = run_ranks(after_construction, 1)[0]
    why = repaired("stage0.undo_step_taken_at_construction")
    assert steps == [1.0], why
    assert weight == pytest.approx(0.99), why  # decayed once: lr 0.1 x weight_decay 0.1


def norm_of_shards() -> float:
    """One parameter sharded over two ranks; the gradients of its shards are 3 and 4."""
    import torch
    import torch.distributed as dist

    start()
    model = torch.nn.Linear(1, 1, bias=False)
    weight: Any = model.weight
    weight.tensor_model_parallel = True
    engine = initialize(model, {"bf16": {"enabled": True}}, mpu=TwoShards())
    engine.backward(engine(torch.full((1, 1), 3.0 + dist.get_rank(), dtype=torch.bfloat16)).sum())
    engine.step()
    return float(engine.get_global_grad_norm())


def test_bf16_norm_leaves_out_shards() -> None:
    norms = run_ranks(norm_of_shards, 2)
    assert norms == [3.0, 3.0], repaired("stage0.mark_gradients")  # 5 would be right


def update_of_a_stage(tied: bool) -> float:
    """Of two stages with one weight each; the change is the clipped gradient (SGD, lr 1)."""
    import torch
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    start()
    linear = (torch.nn.Linear, 1, 1, False)
    layer = TiedLayerSpec("same", *linear) if tied else LayerSpec(*linear)
    model = PipelineModule([layer] * 2, num_stages=2, loss_fn=lambda y, label: 1000.0 * y.sum())
    weight: Any = next(model.parameters())
    torch.nn.init.ones_(weight)
    weight.tensor_model_parallel = tied  # as an embedding cut by vocabulary has it
    engine = initialize(
        model, {"gradient_clipping": 1.0}, optimizer=torch.optim.SGD([weight], lr=1.0)
    )
    engine.train_batch(iter([(torch.ones(1, 1), torch.ones(1, 1))]))
    return 1.0 - float(weight)


def test_pipeline_clips_on_the_norm_of_the_first_stage() -> None:
    first, second = run_ranks(update_of_a_stage, 2, False)
    # Both gradients are 1000, so the right clip makes both 1 / sqrt(2): together a norm of 1.
    assert first == pytest.approx(1.0, rel=1e-4), repaired("stage0.count_each_parameter_once")
    assert second == pytest.approx(1.0, rel=1e-4), repaired("stage0.count_each_parameter_once")


def test_pipeline_counts_a_tied_weight_twice() -> None:
    first, second = run_ranks(update_of_a_stage, 2, True)
    assert first == second
    # 1 would be right, as there is one weight.
    assert first == pytest.approx(0.5**0.5, rel=1e-4), repaired("stage0.count_each_parameter_once")


def norm_in_fp32() -> float | None:
    import torch

    engine = initialize(torch.nn.Linear(1, 1), {"gradient_clipping": 1.0})
    engine.backward(engine(torch.ones(1, 1)).sum())
    engine.step()
    norm: float | None = engine.get_global_grad_norm()
    return norm


def test_fp32_keeps_no_norm() -> None:
    assert run_ranks(norm_in_fp32, 1) == [None], repaired("stage0.keep_grad_norm")
