"""GPUs that one can buy or rent: memory, speed and links, from data sheets and measurements.

Imports no torch: a plan needs no GPU.
"""

from dataclasses import dataclass, replace

from launch.errors import UserError, nearest_or_all
from launch.runtime.hardware import PEAK_TFLOPS

# Measured beside torch's allocator on H200s (torch 2.11, DeepSpeed 0.19.8), in GiB a GPU: CUDA's context
# and libraries on one rank; and with NCCL's buffers on two ranks, for each layout. ZeRO-3 and a pipeline
# open more communicators.
CONTEXT_GIB = 1.3
NCCL_GIB = {"data": 1.8, "zero3": 2.4, "tensor": 1.7, "pipeline": 3.9}
ZERO3_ALONE_GIB = 0.75
# What the allocator reserved on the same cards was 1.1 times the peak in the median, with memory to spare;
# it gives gaps back when a card is full. A layout counts as fitting if this share of the card stays free.
SPARE = 0.05


@dataclass(frozen=True)
class Card:
    """One GPU.

    Attributes:
        name: as in `--gpu`.
        gib: memory that a program can use, in GiB.
        tflops: dense bf16 peak.
        memory_tbs: bandwidth of its memory, TB/s.
        link_gbs: bandwidth to another GPU of the same host in one direction, GB/s.
        host_gbs: bandwidth to host memory in one direction, GB/s.
    """

    name: str
    gib: float
    tflops: float
    memory_tbs: float
    link_gbs: float
    host_gbs: float


# Vendors' data sheets (SXM variants): HBM bandwidth, half of NVLink's or PCIe's two directions together.
# Memory of H100 and H200 as torch reports it; of others, the data sheet's less 1%.
CARDS = {
    card.name: card
    for card in (
        Card("h100", 79.1, PEAK_TFLOPS["H100"], 3.35, 450, 55),
        Card("h200", 139.8, PEAK_TFLOPS["H200"], 4.8, 450, 55),
        Card("b200", 178.0, PEAK_TFLOPS["B200"], 8.0, 900, 55),
        Card("a100", 79.1, PEAK_TFLOPS["A100"], 2.04, 300, 27),
        Card("a100-40", 39.4, PEAK_TFLOPS["A100"], 1.56, 300, 27),
        Card("l40s", 44.5, PEAK_TFLOPS["L40S"], 0.86, 27, 27),
        Card("rtx4090", 23.5, PEAK_TFLOPS["RTX 4090"], 1.01, 27, 27),
    )
}


def card_of(name: str, gib: float | None = None) -> Card:
    """A card by name, with another size of memory if `gib` is given.

    Raises:
        UserError: for an unknown name, or a size that no card has.
    """
    if name not in CARDS:
        raise UserError(f"--gpu: '{name}' is not known;{nearest_or_all(name, CARDS)}")
    if gib is None:
        return CARDS[name]
    if not 0 < gib < 10_000:
        raise UserError(f"--gpu-memory: {gib:g} GiB is no card's memory; for example 80")
    return replace(CARDS[name], gib=gib)


def outside(grid_kind: str, ranks: int) -> float:
    """GiB that a rank needs outside torch's allocator: CUDA's context, and NCCL if there are more ranks."""
    if ranks == 1:
        return CONTEXT_GIB + (ZERO3_ALONE_GIB if grid_kind == "zero3" else 0.0)
    return CONTEXT_GIB + NCCL_GIB[grid_kind]
