"""Any causal language model of transformers behind the two-argument forward of `models/gpt.py`."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from models.parallel.cross_entropy import cross_entropy


def read_config(path: str, changes: dict[str, Any]) -> PreTrainedConfig:
    """The configuration at `path` (a folder, a config.json, or a Hub name) with `changes`.

    Raises:
        OSError: where there is no such configuration.
        ValueError: for a change of a key that the configuration does not have, or a model type
            that transformers does not know.
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
    """The keys of a configuration that switch dropout on, with their probabilities."""
    return {
        key: value
        for key, value in config.to_dict().items()
        if ("dropout" in key or key.endswith("pdrop"))
        and not key.startswith(("summary", "classifier"))  # heads that a language model lacks
        and isinstance(value, float)
        and value > 0.0
    }


class HFCausalLM(nn.Module):
    """A transformers model behind the forward of `models/gpt.py`: logits, or the sum of losses.

    Parameter names are those of transformers behind the prefix `model.`, which the weights file
    leaves out, so that `from_pretrained` reads it.
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
        # transformers makes a mask of documents from positions that start again. Keys and values of
        # past tokens (use_cache) serve generation only.
        logits: Tensor = self.model(
            input_ids=tokens, position_ids=positions, use_cache=False
        ).logits
        return logits if labels is None else cross_entropy(logits, labels, loss_weights)


def from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with the initial weights that its own code draws from torch's global generator."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def from_pretrained(path: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A model with the weights in a folder or on the Hub, in fp32.

    Raises:
        OSError: where there are no weights.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype="float32"
    )
    return model
