"""Measure the network between ranks: time all-reduces of a small and a large tensor.

Runs on every rank, under any launcher; rank 0 prints one line of JSON. Can be run as a program:

    deepspeed --num_gpus 2 launch/doctor/network.py
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the checkout

MARK = "all-reduce: "
SMALL_ELEMENTS = 256  # 1 KiB: measures latency
LARGE_BYTES = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}
SMALL_TIMES, LARGE_TIMES = 50, 4
SECONDS = 50  # then this rank exits, whatever the others do


def measure() -> None:
    """Join the process group, time the all-reduces, and print the result on rank 0.

    Bandwidth is the bus bandwidth of NVIDIA's nccl-tests, 2 (n - 1) / n x bytes / seconds. It is
    comparable to the peak bandwidth of each rank's link.
    """
    signal.alarm(SECONDS)
    from launch.runtime.process_group import init_process_group, prepare_environment

    prepare_environment()
    import torch
    import torch.distributed as dist

    ranks = init_process_group()

    def seconds(elements: int, times: int) -> float:
        tensor = torch.zeros(elements, device=ranks.device)
        for _ in range(2):
            dist.all_reduce(tensor)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        started = time.perf_counter()
        for _ in range(times):
            dist.all_reduce(tensor)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / times

    large = LARGE_BYTES[ranks.device.type]
    latency, took = seconds(SMALL_ELEMENTS, SMALL_TIMES), seconds(large // 4, LARGE_TIMES)
    if ranks.is_main:
        found = {
            "backend": dist.get_backend(),
            "ranks": ranks.world_size,
            "latency_us": round(latency * 1e6, 1),
            "bus_gb_s": round(
                2 * (ranks.world_size - 1) / ranks.world_size * large / took / 1e9, 3
            ),
            "mib": large // 2**20,
        }
        file = os.environ.get("NETWORK_RESULT")
        if file:
            Path(file).write_text(json.dumps(found))
        else:
            print(f"{MARK}{json.dumps(found)}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    measure()
    os._exit(0)
