"""When each workaround is used."""

from deepspeed.runtime.engine import DeepSpeedEngine

from launch.deepspeed_patches.speed.bf16_optimizer import (
    add_gradients_without_a_copy,
    reduce_sums_in_pieces,
)
from launch.deepspeed_patches.speed.host_overhead import (
    ask_for_streams_by_device,
    mark_no_ranges,
    remember_parameters_of_modules,
)
from launch.deepspeed_patches.speed.optimizer_step import (
    gather_small_weights_at_once,
    look_for_overflow_once,
    take_norms_at_once,
)
from launch.deepspeed_patches.speed.zero_gradients import (
    add_reduced_gradients_without_a_copy,
    let_nccl_divide,
    wait_for_reductions_on_the_gpu,
)


def before_engine() -> None:
    """Call it when the ranks have joined, before `deepspeed.initialize`."""
    mark_no_ranges()
    ask_for_streams_by_device()
    let_nccl_divide()


def on_engine(engine: DeepSpeedEngine) -> None:
    """Call it once with each engine."""
    remember_parameters_of_modules()
    add_gradients_without_a_copy(engine)
    reduce_sums_in_pieces(engine)
    add_reduced_gradients_without_a_copy(engine)
    wait_for_reductions_on_the_gpu(engine)
    take_norms_at_once(engine)
    look_for_overflow_once(engine)
    gather_small_weights_at_once(engine)
