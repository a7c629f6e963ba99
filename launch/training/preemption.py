"""Ending a run early, on request, with nothing lost: somebody touches STOP in the run's folder.

A batch system tells a job that its time is nearly up, or that the node is wanted; its script touches
the file. A file, and not a signal: launchers differ in what they pass on to which rank, and all ranks
have to stop after the same step.
"""

import torch
import torch.distributed as dist

from launch.runtime.process_group import Ranks
from launch.runtime.run_dir import RunFolder


def stop_asked(run: RunFolder, ranks: Ranks) -> bool:
    """Whether the run is to save and end now: rank 0 looks, and every rank gets its answer."""
    asked = torch.tensor(int(ranks.first and run.stop.exists()), device=ranks.device)
    dist.broadcast(asked, 0)
    return bool(asked.item())


def stop_obeyed(run: RunFolder, ranks: Ranks) -> None:
    """Take the request away, so that the run can go on later. After the save."""
    if ranks.first:
        run.stop.unlink(missing_ok=True)
