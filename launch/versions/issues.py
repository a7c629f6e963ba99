"""Known defects of DeepSpeed, and the probes whose weights are wrong where one of them is present."""

from typing import NamedTuple


class Issue(NamedTuple):
    """Numbers of issues or pull requests, what they say, and the probes that are all wrong with it.

    No version: where a defect is present is measured. The probes are those that no other defect hits.
    """

    numbers: tuple[int, ...]
    text: str
    probes: tuple[str, ...]


ISSUES = (
    Issue(
        (7718,),
        "ZeRO-2 drops the gradients of all micro batches but the last",
        ("ZeRO-2, accumulation: plain", "ZeRO-2, accumulation: bf16, clip"),
    ),
    Issue(
        (7773, 8154),
        "a pipeline does not average over micro batches: it sums, or each stage divides again",
        ("pipeline, accumulation: plain", "pipeline, accumulation: ZeRO-1, bf16"),
    ),
    Issue(
        (7839,),
        "stage 0 in bf16 divides gradients by a loss scale, and does not clear them",
        ("stage 0, bf16: plain", "stage 0, bf16: accumulation, clip"),
    ),
    Issue(
        (7967,),
        "ZeRO-2 does not give an optimizer on the CPU the gradients of all micro batches",
        ("CPU offload, accumulation: ZeRO-2",),
    ),
    Issue(
        (7981,),
        "the same where a step has several `backward` calls of its own",
        ("several `backward` calls a step, CPU offload: ZeRO-2",),
    ),
    Issue(
        (7985,),
        "ZeRO-1 in bf16 with fp32 gradients does not average the last micro batch over ranks",
        ("ZeRO-1, bf16, fp32 gradients: accumulation",),
    ),
    Issue(
        (8224,),
        "a loss outside the engine's `forward` is not averaged over micro batches",
        (
            "a second loss outside `forward`, accumulation: ZeRO-2, bf16",
            "a second loss outside `forward`, accumulation: ZeRO-3",
        ),
    ),
    Issue(
        (8393,),
        "stage 0 in fp16 divides gradients by a scale that the loss was not multiplied by",
        ("stage 0, fp16: plain", "stage 0, fp16: clip"),
    ),
    Issue(
        (8443,),
        "at ZeRO-3 Muon is applied to each micro batch",
        ("Muon, ZeRO-3, accumulation: plain",),
    ),
    Issue(
        (8432,),
        "Muon in fp16 does not recover from an overflow",
        ("Muon, fp16, overflow: at first",),
    ),
)
