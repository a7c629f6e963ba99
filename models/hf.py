"""Any causal language model from transformers, with the forward signature of `models/gpt.py`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from models.parallel.cross_entropy import cross_entropy

SAME_LOGITS = 1e-4  # of their standard deviation; rounding alone changes less


def read_config(path: str, changes: dict[str, Any]) -> PreTrainedConfig:
    """The configuration at `path` (a folder, a config.json, or a Hub name) with `changes`.

    Raises:
        OSError: if there is no such configuration.
        ValueError: if a changed key is not in the configuration, or transformers does not know the
            model type.
    """
    if "/" in path and path.startswith((".", "/")) and not Path(path).exists():
        raise OSError(f"there is no file or folder {path}")
    config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if not changes:
        return config
    values, renamed = config.to_dict(), dict(config.attribute_map)
    for key, value in changes.items():
        name = renamed.get(key, key)
        if name in ("dtype", "torch_dtype"):
            raise ValueError(
                f"changes.{key} would do nothing: the DeepSpeed JSON decides the dtype"
            )
        if name not in values:
            raise ValueError(f"{type(config).__name__} has no key '{key}'{_rope_hint(key, values)}")
        values[name] = value
    # Made anew, so that the values are checked, and those that depend on them are worked out.
    return type(config).from_dict(values)


def _rope_hint(key: str, values: dict[str, Any]) -> str:
    if key not in ("rope_theta", "rope_scaling") or "rope_parameters" not in values:
        return ""
    return f"; set rope_parameters as a whole, which is {values['rope_parameters']}"


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


def most_positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence that a model was made for; None if there is no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else None  # XLNet: -1


class HFCausalLM(nn.Module):
    """A transformers model with the forward of `models/gpt.py`: logits, or the summed loss.

    Parameters have transformers' names with the prefix `model.`. The weights file omits the prefix,
    so `from_pretrained` can read it.

    Raises:
        ValueError: if the configuration asks for a router loss that this class does not know.
    """

    def __init__(self, model: PreTrainedModel, checkpoint_activations: bool = False) -> None:
        super().__init__()
        self.model = model
        router_loss = getattr(model.config, "output_router_logits", False)
        if router_loss and not hasattr(model, "router_aux_loss_coef"):
            raise ValueError(
                f"{type(model).__name__} has no router_aux_loss_coef, so that its router loss is not "
                "known; use model.changes.output_router_logits=false"
            )
        if checkpoint_activations:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """As `GPT.forward`: `[batch, sequence]` to logits, or to a scalar loss with labels.

        In training, a mixture of experts with `output_router_logits` adds its router loss, times its
        coefficient, to the loss of each label.
        """
        # transformers builds a document mask from positions that restart. The key/value cache
        # (use_cache) is only for generation.
        output = self.model(input_ids=tokens, position_ids=positions, use_cache=False)
        logits: Tensor = output.logits
        if labels is None:
            return logits
        loss = cross_entropy(logits, labels, loss_weights)
        router_loss = getattr(output, "aux_loss", None)
        if self.training and router_loss is not None:
            counted = labels.numel() if loss_weights is None else loss_weights.sum()
            loss = loss + self.model.router_aux_loss_coef * router_loss * counted
        return loss


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Check that a token's logits do not depend on later tokens, on a sequence of 8.

    Raises:
        ValueError: if they do: an encoder, which would see the tokens that it is to predict.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    tokens = torch.arange(8, 16, device=device)[None] % model.config.get_text_config().vocab_size
    other = tokens.clone()
    other[0, -1] = tokens[0, 0]
    first, second = (
        model(input_ids=each, use_cache=False).logits[0, :-1].float() for each in (tokens, other)
    )
    model.train(was_training)
    if float((first - second).abs().max()) > SAME_LOGITS * float(first.std()):
        raise ValueError(
            f"{type(model).__name__} is not causal: it sees the tokens that it is to predict; use a "
            "decoder (for some encoders model.changes.is_decoder=true)"
        )


@torch.no_grad()
def check_documents(model: PreTrainedModel) -> None:
    """Check that positions that restart keep the tokens before them out of sight, on two texts of 4.

    Raises:
        ValueError: if they do not: of some architectures, transformers has no mask for it.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    tokens = torch.arange(8, 16, device=device)[None] % model.config.get_text_config().vocab_size
    positions = torch.arange(8, device=device)[None] % 4
    packed = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, 4:]
    alone = model(input_ids=tokens[:, 4:], use_cache=False).logits
    model.train(was_training)
    apart = float((packed.float() - alone.float()).abs().max())
    if apart > SAME_LOGITS * float(alone.float().std()):
        raise ValueError(
            f"{type(model).__name__} does not keep documents apart: it sees the one before through "
            "positions that restart, as data.document_mask and data.format=chat need it; use another model"
        )


def from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """A model in fp32 with initial weights drawn by its own code from torch's global generator."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype="float32")
    return model


def from_pretrained(path: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A model with weights from a folder or the Hub, in fp32.

    Raises:
        OSError: if there are no weights.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype="float32", trust_remote_code=False
    )
    return model
