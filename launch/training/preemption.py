"""End a run early without losing work: touch STOP in the run's folder.

A batch system warns a job that its time is nearly up or that it will be preempted; the job script
then touches the file. A file rather than a signal, because launchers differ in which signals they
forward to which rank, and all ranks must stop after the same step.
"""

import torch
import torch.distributed as dist

from launch.runtime.process_group import RankInfo
from launch.runtime.run_dir import RunDir


def stop_requested(run: RunDir, ranks: RankInfo) -> bool:
    """Whether the run should save and stop now: rank 0 checks and broadcasts the answer."""
    asked = torch.tensor(int(ranks.is_main and run.stop.exists()), device=ranks.device)
    dist.broadcast(asked, 0)
    return bool(asked.item())


def clear_stop_request(run: RunDir, ranks: RankInfo) -> None:
    """Remove the request, so the run can resume later. Call it after the save."""
    if ranks.is_main:
        run.stop.unlink(missing_ok=True)
