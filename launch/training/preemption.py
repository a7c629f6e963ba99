"""Ending a run early, on request, with nothing lost: somebody touches STOP in the run's folder.

A batch system tells a job that its time is nearly up, or that the node is wanted; its script touches
the file. A file, and not a signal: launchers differ in what they pass on to which rank, and all ranks
have to stop after the same step.
"""

import torch
import torch.distributed as dist

from launch.runtime.process_group import RankInfo
from launch.runtime.run_dir import RunDir


def stop_requested(run: RunDir, ranks: RankInfo) -> bool:
    """Whether the run is to save and end now: rank 0 looks, and every rank gets its answer."""
    asked = torch.tensor(int(ranks.is_main and run.stop.exists()), device=ranks.device)
    dist.broadcast(asked, 0)
    return bool(asked.item())


def clear_stop_request(run: RunDir, ranks: RankInfo) -> None:
    """Take the request away, so that the run can go on later. After the save."""
    if ranks.is_main:
        run.stop.unlink(missing_ok=True)
