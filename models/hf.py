"""Any causal language model from transformers, with the forward signature of `models/gpt.py`."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from models.parallel.cross_entropy import cross_entropy


def read_config(path: str, changes: dict[str, Any]) -> PreTrainedConfig:
    """The configuration at `path` (a folder, a config.json, or a Hub name) with `changes`.

    Raises:
        OSError: if there is no such configuration.
        ValueError: if a changed key is not in the configuration, or transformers does not know the
            model type.
    """
    if "/" in path and path.startswith((".", "/")) and not Path(path).exists():
        raise OSError(f"there is no file or folder {path}")
    config = AutoConfig.from_pretrained(path)
    for key, value in changes.items():
        if not hasattr(config, key):
            raise ValueError(f"{type(config).__name__} has no key '{key}'")
        setattr(config, key, value)
    return config


def dropouts(config: PreTrainedConfig) -> dict[str, float]:
    """The configuration keys that enable dropout, with their probabilities."""
    return {
        key: value
        for key, value in config.to_dict().items()
        if ("dropout" in key or key.endswith("pdrop"))
        and not key.startswith(("summary", "classifier"))  # heads that a language model lacks
        and isinstance(value, float)
        and value > 0.0
    }


class HFCausalLM(nn.Module):
    """A transformers model with the forward of `models/gpt.py`: logits, or the summed loss.

    Parameters have transformers' names with the prefix `model.`. The weights file omits the prefix,
    so `from_pretrained` can read it.
    """

    def __init__(self, model: PreTrainedModel, checkpoint_activations: bool = False) -> None:
        super().__init__()
        self.model = model
        if checkpoint_activations:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """As `GPT.forward`: `[batch, sequence]` to logits, or to a scalar loss with labels."""
        # transformers builds a document mask from positions that restart. The key/value cache
        # (use_cache) is only for generation.
        logits: Tensor = self.model(
            input_ids=tokens, position_ids=positions, use_cache=False
        ).logits
        return logits if labels is None else cross_entropy(logits, labels, loss_weights)


def from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with initial weights drawn by its own code from torch's global generator."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def from_pretrained(path: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A model with weights from a folder or the Hub, in fp32.

    Raises:
        OSError: if there are no weights.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype="float32"
    )
    return model
