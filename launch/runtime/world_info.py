"""What `deepspeed.launcher.launch` is told of all hosts: how many ranks each has, and on which devices."""

import base64
import json
from collections.abc import Mapping, Sequence


def encode_world_info(devices: Mapping[str, Sequence[int | str]]) -> str:
    """The value of `--world_info`: each host's devices, hosts in the order of their ranks."""
    listed = {host: list(own) for host, own in devices.items()}
    return base64.urlsafe_b64encode(json.dumps(listed).encode()).decode()
