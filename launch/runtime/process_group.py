"""Set up the process group in the same way under every launcher, and without one."""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from launch.errors import UserError
from launch.runtime.local_launcher import free_port, rank_environment
from launch.runtime.rank_env import set_rank_env_from_launcher
from launch.runtime.signals import end_with_launcher

if TYPE_CHECKING:
    import torch

Decision = TypeVar("Decision")
TIMEOUT = timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", "10")))


@dataclass(frozen=True)
class RankInfo:
    """This process's global rank, world size, local rank and device."""

    rank: int
    world_size: int
    local_rank: int
    device: "torch.device"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints for all."""
        return self.rank == 0


def prepare_environment() -> None:
    """Set up the environment before torch is imported. Call this first.

    Without a launcher, the world size is 1. If the launcher is killed, its ranks exit too.
    """
    set_rank_env_from_launcher()
    if "RANK" not in os.environ:
        os.environ |= rank_environment(0, 1, free_port())
    else:
        end_with_launcher()
    # DeepSpeed's launcher sets LOCAL_SIZE, torchrun and Accelerate LOCAL_WORLD_SIZE. Otherwise,
    # each rank would start one thread per core of the host.
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(local)))


def threads_per_rank(ranks: int) -> int:
    """A rank's share of the cores that this process may use, with so many ranks on the host."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def schedule_as_batch() -> None:
    """Let no thread of this process take a core from another when it wakes up (Linux's SCHED_BATCH).

    gloo's network thread wakes up when data is there, takes the core from the thread that holds its lock,
    and asks for the lock again and again. With two ranks on two cores, an all-reduce took 2.4 times the
    CPU time and 2.9 times as long. Threads inherit the policy, so call this before gloo starts. Does
    nothing where another policy has been chosen.
    """
    with contextlib.suppress(OSError):  # a sandbox that has no such call
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def init_process_group() -> RankInfo:
    """Join the process group: NCCL if this rank has a GPU, otherwise gloo.

    Returns after all ranks have joined.

    Raises:
        UserError: if the rendezvous port is in use.
    """
    import deepspeed
    import torch

    from launch.deepspeed_patches.startup import skip_shared_memory_op

    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed uses names that torch 2.13 deprecated: a warning per rank and collective.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    skip_shared_memory_op()
    # Groups that are made later, by us or by DeepSpeed, would wait for a rank that hangs as long as torch
    # has it: half an hour with gloo.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(torch.distributed.distributed_c10d, name, TIMEOUT)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # srun and others may show each rank its own GPU alone.
        device = torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)
        torch.cuda.set_device(device)
    else:
        schedule_as_batch()
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            timeout=TIMEOUT,
            verbose=False,
        )
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {os.environ.get('MASTER_PORT')} is in use on this machine, by another run perhaps; "
            "choose another one: deepspeed --master_port N, or MASTER_PORT=N for other launchers"
        ) from None
    return RankInfo(rank, world_size, local_rank, device)


def shutdown(code: int = 0) -> NoReturn:
    """Wait for all ranks, then exit with `code`.

    Skips the normal interpreter exit, which stops threads of gloo and the autograd engine in no
    defined order; a test run once aborted there, after all work was done.
    """
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def from_main_rank(ranks: RankInfo, decide: Callable[[], Decision]) -> Decision:
    """Broadcast rank 0's decision, which must be picklable, to all ranks."""
    import torch.distributed as dist

    decision: list[Any] = [decide() if ranks.is_main else None]
    dist.broadcast_object_list(decision, src=0)
    first: Decision = decision[0]
    return first
