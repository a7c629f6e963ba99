"""Plain layer-wise model parallelism: one process, several devices, consecutive layers on each.

This is the baseline that pipelines improve on. A batch visits the devices one after the other, so
only one device works at a time: p devices hold a model p times as large but run no faster than one.
Hugging Face Accelerate's `dispatch_model` moves each layer's inputs to the layer's device.
"""

from typing import Any

import torch
from accelerate import dispatch_model
from torch import nn

from models.gpt import GPT


def device_map(model: GPT, devices: list[torch.device]) -> dict[str, torch.device]:
    """Map each part of the model to a device: consecutive blocks, equally many per device.

    A tied output projection goes on the embedding's device: on two devices, the shared weight would
    become two weights, each with half of the gradient. The final norm goes with the projection.

    Raises:
        ValueError: if there are more devices than blocks.
    """
    layers = len(model.blocks)
    if len(devices) > layers:
        raise ValueError(f"{len(devices)} devices are more than the model's {layers} blocks")
    end = devices[0] if model.config.tied else devices[-1]
    places = {"embedding": devices[0], "norm": end, "output": end}
    places |= {f"blocks.{i}": devices[i * len(devices) // layers] for i in range(layers)}
    return places


def spread_over(model: GPT, devices: list[torch.device]) -> nn.Module:
    """The same model with its layers spread over `devices`; call and train it as before.

    Tokens `[batch, sequence]` may be on any device; the result is on the same device.

    Raises:
        ValueError: as `device_map`.
    """
    places: dict[str, Any] = dict(device_map(model, devices))
    # Forced: if all devices are the same (two CPUs in a test), Accelerate would add no hooks.
    spread: nn.Module = dispatch_model(model, places, main_device=devices[0], force_hooks=True)
    return spread
