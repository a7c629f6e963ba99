"""`--world_info` of `deepspeed.launcher.launch`: the ranks and devices of each host."""

import base64
import json
from collections.abc import Mapping, Sequence


def encode_world_info(devices: Mapping[str, Sequence[int | str]]) -> str:
    """Encode `--world_info`: each host's devices, with hosts in rank order."""
    listed = {host: list(own) for host, own in devices.items()}
    return base64.urlsafe_b64encode(json.dumps(listed).encode()).decode()
