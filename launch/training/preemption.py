"""End a run early without losing work: touch STOP in the run's folder, or signal a rank.

A batch system warns a job that its time is nearly up or that it will be preempted. Job scripts touch the
file, as launchers differ in which signals they forward to which rank. A rank that does get SIGTERM or
SIGUSR1 asks for the same (`launch/runtime/signals.py`). All ranks must stop after the same step.
"""

import torch
import torch.distributed as dist

from launch.runtime.process_group import RankInfo
from launch.runtime.run_dir import RunDir
from launch.runtime.signals import STOPPED_BY_SIGNAL, stop_asked


def stop_requested(run: RunDir, ranks: RankInfo) -> bool:
    """Whether the run should save and stop now: if any rank was signaled, or rank 0 sees the file."""
    alone = stop_asked() or (ranks.is_main and run.stop.exists())
    asked = torch.tensor(int(alone), device=ranks.device)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return bool(asked.item())


def clear_stop_request(run: RunDir, ranks: RankInfo) -> int:
    """Remove the request, so the run can resume later. Call it after the save, on every rank.

    Returns:
        The exit code: 0 if somebody touched the file, `STOPPED_BY_SIGNAL` otherwise.
    """
    by_file = torch.tensor(int(ranks.is_main and run.stop.exists()), device=ranks.device)
    dist.broadcast(by_file, 0)
    if ranks.is_main:
        run.stop.unlink(missing_ok=True)
    return 0 if by_file.item() else STOPPED_BY_SIGNAL
