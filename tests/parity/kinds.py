"""One layout of each kind, for the tests that want them all."""

from tests.parity.cases import Case

TP2, PP2, SEQUENCE = "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"
COMPILE, STDLIB = "train.compile=true", "data.source=python-stdlib"
INTERLEAVED = ("parallel.schedule=interleaved", "parallel.model_chunks=2")
# What ZeRO-1's JSON needs to step on the CPU.
OFFLOAD = (
    "deepspeed.zero_optimization.offload_optimizer.device=cpu",
    "deepspeed.optimizer.params.torch_adam=null", "deepspeed.optimizer.params.fused=null",
)  # fmt: skip

KINDS = {
    "tp2": Case("zero1", 2, micro_batch=2, overrides=(TP2,)),
    "tp2_dp2_zero0": Case("zero0", 4, micro_batch=2, overrides=(TP2,)),
    "tp2_dp2_zero3": Case("zero3", 4, micro_batch=2, overrides=(TP2,)),
    "tp2_sequence": Case("zero1", 2, micro_batch=2, overrides=(TP2, SEQUENCE)),
    "tp4_one_key": Case(
        "zero2", 4, "fp32", "llama", 2,
        overrides=("parallel.tensor=4", "model.kv_heads=1", "model.qk_norm=true", "model.vocab=321"),
    ),
    "pp2_dp2": Case("zero1", 4, micro_batch=2, overrides=(PP2,)),
    "pp2_gpipe_zero0": Case("zero0", 2, micro_batch=2, overrides=(PP2, "parallel.schedule=gpipe")),
    "pp2_naive_untied": Case(
        "zero1", 2, "fp32", "llama", 2, overrides=(PP2, "parallel.schedule=naive")
    ),
    "pp4_zero_bubble": Case(
        "zero1", 4, micro_batch=2,
        overrides=("parallel.pipeline=4", "parallel.schedule=zb-h1", "model.layers=4"),
    ),
    "pp2_interleaved": Case(
        "zero1", 2, micro_batch=2,
        overrides=(PP2, *INTERLEAVED, "model.layers=4"),
    ),
    "pp2_tp2": Case("zero1", 4, micro_batch=2, overrides=(TP2, PP2, "model.vocab=321")),
    "pp2_tp2_sequence": Case("zero1", 4, micro_batch=2, overrides=(TP2, PP2, SEQUENCE)),
    "3d": Case("zero1", 8, micro_batch=2, overrides=(TP2, PP2)),
}  # fmt: skip


def axes_of(case: Case) -> set[str]:
    """What such a case is of: its ZeRO stage, its precision, and what its `parallel` block sets.

    `parallel.tensor=4` is of the kind of `parallel.tensor=2`; eight ranks are of a kind of their own.
    """
    block = {o.partition("=") for o in case.overrides if o.startswith("parallel.")}
    axes = {key if value.isdecimal() else f"{key}={value}" for key, _, value in block}
    return {case.stem, case.precision, *axes, *(["8 ranks"] if case.ranks == 8 else [])}
