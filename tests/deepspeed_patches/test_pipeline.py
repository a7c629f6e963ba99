"""Raw DeepSpeed pipelines show each defect that `launch/deepspeed_patches/pipeline.py` works around.

A test here fails once DeepSpeed has repaired the defect; its message names the workaround to remove.
"""

from collections.abc import Iterator

from tests.deepspeed_patches.raw import initialize, repaired, start
from tests.ranks import run_ranks


def tied_weight_before_and_after_a_step() -> tuple[list[list[float]], list[list[float]]]:
    """One weight on both stages, in bf16 with gradients accumulated in fp32."""
    import torch
    from deepspeed.pipe import PipelineModule, TiedLayerSpec

    start()
    layers = [TiedLayerSpec("same", torch.nn.Linear, 2, 2, bias=False) for _ in range(2)]
    model = PipelineModule(layers, num_stages=2, loss_fn=lambda y, label: y.square().sum())
    for parameter in model.parameters():  # with these, the copies' gradients differ in their signs
        parameter.data = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    engine = initialize(
        model,
        {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            # With an offloaded optimizer ZeRO-1 is not BF16_Optimizer.
            "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        },
    )
    inputs = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    weight = next(model.parameters())
    before = weight.tolist()
    engine.train_batch(iter([(inputs, inputs)]))
    return before, weight.tolist()


def test_tied_weights_drift_apart() -> None:
    (before, first), (same, second) = run_ranks(tied_weight_before_and_after_a_step, 2)
    assert before == same
    assert first != second, repaired("pipeline.sum_tied_gradients_where_they_are")


def gradient_and_logits_of_the_first_micro_batch() -> tuple[float, bool]:
    """Two forward passes, then one backward pass, of the first micro batch; inputs are 3 and 5."""
    import torch
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe import schedule

    start()
    model = PipelineModule(
        [LayerSpec(torch.nn.Linear, 1, 1, bias=False)],
        num_stages=1,
        loss_fn=lambda y, label: y.sum(),
    )
    engine = initialize(model, {})
    engine.set_dataiterator(iter([(torch.full((1, 1), x), torch.ones(1)) for x in (3.0, 5.0)]))

    class ForwardsFirst(schedule.PipeSchedule):
        def steps(self) -> Iterator[list[schedule.PipeInstruction]]:
            for buffer in range(2):
                yield [schedule.LoadMicroBatch(buffer), schedule.ForwardPass(buffer)]
            yield [schedule.BackwardPass(0)]

        def num_pipe_buffers(self) -> int:
            return 2

    engine._compute_loss = True
    engine._exec_schedule(ForwardsFirst(micro_batches=2, stages=1, stage_id=0))
    weight = next(model.parameters())
    return weight.grad.item(), engine.pipe_buffers["outputs"][0] is not None


def test_engine_keeps_one_loss_and_all_logits() -> None:
    gradient, holds_logits = run_ranks(gradient_and_logits_of_the_first_micro_batch, 1)[0]
    assert gradient == 5.0, repaired("pipeline.use_schedule")
    assert holds_logits, repaired("pipeline.use_schedule")


def sums_and_gradient_with_one_between() -> tuple[float, float]:
    """A pipeline of one stage: a gradient of 1 between two backward passes that have one of 2 each."""
    import torch
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe import schedule

    start()
    model = PipelineModule(
        [LayerSpec(torch.nn.Linear, 1, 1, bias=False)],
        num_stages=1,
        loss_fn=lambda y, label: y.sum(),
    )
    engine = initialize(
        model,
        {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": 1},
        },
    )
    inputs = torch.full((1, 1), 2.0, dtype=torch.bfloat16)
    engine.set_dataiterator(iter([(inputs, inputs)] * 2))
    weight = next(model.parameters())

    class Between(schedule.PipeSchedule):
        def steps(self) -> Iterator[list[schedule.PipeInstruction]]:
            for _ in range(2):
                yield [
                    schedule.LoadMicroBatch(0),
                    schedule.ForwardPass(0),
                    schedule.BackwardPass(0),
                ]
                weight.backward(torch.ones_like(weight))

        def num_pipe_buffers(self) -> int:
            return 1

    engine._compute_loss = True
    engine._exec_schedule(Between(micro_batches=2, stages=1, stage_id=0))
    return weight._hp_grad.item(), weight.grad.item()


def test_gradients_between_backward_passes_are_lost() -> None:
    summed, left = run_ranks(sums_and_gradient_with_one_between, 1)[0]
    assert summed == 4.0, repaired("pipeline.run_weight_passes")
    assert left == 3.0, repaired("pipeline.run_weight_passes")


def first_and_last_and_neighbours() -> tuple[bool, bool, int, int]:
    """Of a rank of two stages whose module says that what runs is neither first nor last."""
    import torch
    from deepspeed.pipe import LayerSpec, PipelineModule

    start()
    layers = [LayerSpec(torch.nn.Linear, 1, 1) for _ in range(4)]
    model = PipelineModule(layers, num_stages=2, loss_fn=lambda y, label: y.sum())
    model.at_start = model.at_end = lambda: False
    engine = initialize(model, {})
    return engine.is_first_stage(), engine.is_last_stage(), engine.prev_stage, engine.next_stage


def test_engine_is_first_and_last_by_its_rank_alone() -> None:
    """A ring of stages has no ends, and nothing in a module says which part of it runs."""
    found = run_ranks(first_and_last_and_neighbours, 2)
    assert found == [(True, False, -1, 1), (False, True, 0, 2)], repaired(
        "model_chunks.run_model_chunks"
    )
