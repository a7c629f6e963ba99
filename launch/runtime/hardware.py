"""Peak throughput and memory use of the devices."""

import re
import resource
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Dense bf16 peaks with fp32 accumulation, in TFLOP/s, from the vendors' data sheets (V100, T4: fp16);
# for the SXM variant if there are several. A MI250X is two devices. For others, no MFU is reported.
PEAK_TFLOPS = {
    "GB200": 2500.0, "B200": 2250.0, "H200": 989.0, "H100": 989.0, "H100 PCIe": 756.0,
    "H100 NVL": 835.0, "GH200": 989.0, "H800": 989.0, "H20": 148.0, "A100": 312.0, "A800": 312.0,
    "A40": 149.7, "A30": 165.0, "A10": 125.0, "A10G": 70.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "V100": 125.0, "T4": 65.0, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71.0,
    "RTX 6000 Ada": 364.2, "RTX A6000": 154.8, "MI325X": 1307.4, "MI300X": 1307.4, "MI250X": 191.5,
}  # fmt: skip


def device_peak_tflops(device: "torch.device") -> float | None:
    """The dense half-precision peak of a device in TFLOP/s, or None if unknown."""
    if device.type != "cuda":
        return None
    import torch

    return peak_tflops(torch.cuda.get_device_name(device))


def peak_tflops(device_name: str) -> float | None:
    """The peak of a device as its driver names it: the key of `PEAK_TFLOPS` with most words in it."""
    words = set(re.findall(r"[A-Za-z0-9]+", device_name))
    matching = [key for key in PEAK_TFLOPS if set(key.split()) <= words]
    return PEAK_TFLOPS[max(matching, key=lambda key: len(key.split()))] if matching else None


def peak_memory_gib(device: "torch.device") -> float:
    """Peak memory of this process so far in GiB: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
