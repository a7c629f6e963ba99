"""Who am I among the ranks: set up once, the same under every launcher and without one."""

import os
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from launch.errors import UserError
from launch.runtime.signals import end_with_launcher

if TYPE_CHECKING:
    import torch

Decision = TypeVar("Decision")
TIMEOUT = timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", "10")))


@dataclass(frozen=True)
class RankInfo:
    """This process's place: global rank, number of ranks, rank on this host, and device."""

    rank: int
    world_size: int
    local_rank: int
    device: "torch.device"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which speaks for all."""
        return self.rank == 0


def prepare_environment() -> None:
    """Settle what has to stand before torch is imported. Call it first.

    Without a launcher, the process becomes the one rank of a world of one. A rank whose launcher
    is killed ends with it.
    """
    set_rank_env_from_mpi()
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {
            "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    else:
        end_with_launcher()
    # DeepSpeed's launcher says LOCAL_SIZE, torchrun and Accelerate LOCAL_WORLD_SIZE. Without this,
    # each of n ranks would start a thread for every core of the host.
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    threads = max(1, len(os.sched_getaffinity(0)) // local)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def set_rank_env_from_mpi() -> None:
    """Under mpirun without another launcher, RANK and the like are MPI's, or each process would be alone.

    `deepspeed --launcher openmpi` starts ranks so.

    Raises:
        UserError: where nobody has said at which host and port the ranks meet.
    """
    if "RANK" in os.environ or "OMPI_COMM_WORLD_RANK" not in os.environ:
        return
    for name, mpi in (
        ("RANK", "RANK"), ("WORLD_SIZE", "SIZE"),
        ("LOCAL_RANK", "LOCAL_RANK"), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    ):  # fmt: skip
        os.environ[name] = os.environ[f"OMPI_COMM_WORLD_{mpi}"]
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not set: mpirun does not say where the ranks meet; add -x "
            "MASTER_ADDR=<first host> -x MASTER_PORT=29500, or use scripts/submit.py --cluster openmpi"
        )


def init_process_group() -> RankInfo:
    """Join the process group: NCCL where this rank has a GPU, gloo elsewhere.

    Returns after every rank of the world has joined.

    Raises:
        UserError: where the port at which the ranks meet is taken.
    """
    import deepspeed
    import torch

    from launch.deepspeed_patches.startup import skip_shared_memory_op

    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed calls what torch 2.13 has renamed; once per rank and a collective, and nothing to fix.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    skip_shared_memory_op()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
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


def shutdown() -> NoReturn:
    """End this rank, successfully, when all ranks have come here.

    Without the interpreter's own end: it takes down threads of gloo and the autograd engine in no
    certain order, and a run of the tests has aborted there, with everything done and written.
    """
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def from_main_rank(ranks: RankInfo, decide: Callable[[], Decision]) -> Decision:
    """Rank 0's decision, on every rank. Whatever it is has to be picklable."""
    import torch.distributed as dist

    decision: list[Any] = [decide() if ranks.is_main else None]
    dist.broadcast_object_list(decision, src=0)
    first: Decision = decision[0]
    return first
