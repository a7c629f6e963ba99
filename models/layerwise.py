"""Plain layer-wise model parallelism: one process, several devices, each with a run of the layers.

The baseline that pipelines improve on. A batch goes through the devices one after the other, so that
all but one wait at any time: p devices hold a model p times as large, and are as fast as one.
Hugging Face Accelerate's `dispatch_model` moves what a layer needs to the layer's device.
"""

from typing import Any

import torch
from accelerate import dispatch_model
from torch import nn

from models.gpt import GPT


def device_map(model: GPT, devices: list[torch.device]) -> dict[str, torch.device]:
    """Which device each part of the model goes to: blocks in equal runs, in their order.

    The output projection lies with the embedding where they are tied: the same weight on two devices
    would be two weights, each with half of the gradient. The last norm goes with it.

    Raises:
        ValueError: where there are more devices than blocks.
    """
    layers = len(model.blocks)
    if len(devices) > layers:
        raise ValueError(f"{len(devices)} devices are more than the model's {layers} blocks")
    end = devices[0] if model.config.tied else devices[-1]
    places = {"embedding": devices[0], "norm": end, "output": end}
    places |= {f"blocks.{i}": devices[i * len(devices) // layers] for i in range(layers)}
    return places


def spread_over(model: GPT, devices: list[torch.device]) -> nn.Module:
    """The same model with its layers on `devices`, to be called and trained as before.

    Tokens `[batch, sequence]` may come on any device; the result is on the device of the tokens.

    Raises:
        ValueError: as `device_map`.
    """
    places: dict[str, Any] = dict(device_map(model, devices))
    # Forced, because with one kind of device (two CPUs in a test) Accelerate would add no hooks.
    spread: nn.Module = dispatch_model(model, places, main_device=devices[0], force_hooks=True)
    return spread
