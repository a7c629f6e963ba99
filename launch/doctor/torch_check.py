"""Check a host's torch by importing it, and the cache of compiled ops.

Needs the checkout and its packages, so it runs after `probe.py`, which needs neither:

    python -m launch.doctor.torch_check HOST

prints the results as JSON, labelled with `HOST`.
"""

import json
import sys
from dataclasses import asdict

from launch.doctor import probe
from launch.doctor.checks import CheckResult


def check_framework(host: str) -> list[CheckResult]:
    """Run both checks on this host."""
    return [*check_cache(host), *check_torch(host)]


def check_cache(host: str) -> list[CheckResult]:
    """Check the cache of compiled ops, including leftovers of killed builds."""
    from launch.ops.builder import built_ops, stale_locks, use_private_cache

    built = ", ".join(built_ops()) or "empty"
    lines = [CheckResult("ok", host, f"JIT cache {use_private_cache()}: {built}")]
    for lock in stale_locks():
        lines.append(
            CheckResult(
                "FAIL",
                host,
                f"JIT cache: {lock} is left from a build that was killed; DeepSpeed waits "
                "on it for ever",
                f"run: rm {lock} (unless another host is building)",
            )
        )
    return lines


def check_torch(host: str) -> list[CheckResult]:
    """Check that torch can be imported, sees the GPUs, and has its backends."""
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:
        return [CheckResult("FAIL", host, f"torch does not import: {error}", "run: make setup")]

    cuda = torch.cuda.is_available()
    text = f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPUs"
    lines = [CheckResult("ok", host, text)]
    if probe.gpus() and not cuda:
        lines.append(
            CheckResult(
                "FAIL",
                host,
                "there are GPUs, and torch sees none",
                "CPU build, old driver, or "
                "CUDA_VISIBLE_DEVICES is empty; pip install torch from the CUDA index",
            )
        )
    for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())):
        if there:
            version = (
                ".".join(map(str, torch.cuda.nccl.version())) if name == "nccl" and cuda else ""
            )
            lines.append(CheckResult("ok", host, f"{name} {version}".strip()))
        elif name == "gloo" or cuda:
            lines.append(CheckResult("FAIL", host, f"built without {name}", "install PyPI's torch"))
    for number in range(1, torch.cuda.device_count()):
        if not torch.cuda.can_device_access_peer(0, number):
            lines.append(
                CheckResult(
                    "warn",
                    host,
                    f"GPU 0 does not reach GPU {number} directly",
                    "no NVLink or P2P: tensor parallelism will be slow",
                )
            )
    return lines


if __name__ == "__main__":
    print(json.dumps([asdict(line) for line in check_framework(sys.argv[1])]))
