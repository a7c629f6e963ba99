"""AutoTP, which shards models of `family: hf` over tensor ranks: plans that it misses or gets wrong.

AutoTP shards a transformers model by the plan that transformers ships with it: the linear layers of
attention and MLP, by output rows ("colwise": queries, keys, values, gate, up) or input columns
("rowwise"), and an output layer of its own by vocabulary. Embeddings, tied output layers, norms and
the biases of row-parallel layers stay whole on every tensor rank. Shards may be uneven: 3 key/value
heads on 2 ranks are 2 and 1. DeepSpeed numbers the ranks as `models/parallel/topology.py` does, tensor
coordinate innermost; all ranks of a tensor group must get the same batch.
"""

import re
from typing import TYPE_CHECKING, Any

from deepspeed.module_inject.tp_plan_converter import SUPPORTED_STYLES, TPPlanConverter
from deepspeed.runtime.tensor_parallel.config import _get_hf_tp_plan
from torch import nn

from launch.errors import UserError

if TYPE_CHECKING:
    from models.hf import HFCausalLM

_WITHOUT = (
    "use parallel.tensor=1 and a ds_configs/zero3*.json, which shards any model over the ranks"
)


def check_plan(model: "HFCausalLM", tensor: int, stage: int) -> None:
    """Reject a model that AutoTP cannot shard, or cuts wrongly. The model may be on "meta".

    Defect: where a plan leaves out a parameter that works on a shard (the learned activation of Apertus),
        AutoTP leaves each rank its own part of the gradient.
    Versions: DeepSpeed 0.19.8.
    Workaround: read the plan as AutoTP does, and reject such a model, with those that AutoTP itself
        rejects later or cuts by the names of layers.
    Proof: test_autotp.py::test_autotp_leaves_parameters_of_apertus_out

    Raises:
        UserError: naming the reason, and the nearest layout that works.
    """
    from models.hf import dropouts

    config: Any = model.model.config
    kind, plan = config.model_type, _get_hf_tp_plan(model.model) or {}
    unknown = sorted(set(plan.values()) - SUPPORTED_STYLES)
    if unknown:
        raise UserError(
            f"parallel.tensor: the plan of {kind} models has {', '.join(unknown)}, which DeepSpeed's "
            f"AutoTP does not know; {_WITHOUT}"
        )
    if not _matching(model.model, plan, ("rowwise",)):
        raise UserError(
            f"parallel.tensor: transformers has no plan to shard {kind} models; {_WITHOUT}"
        )
    whole = _whole_among_shards(model.model, plan)
    if whole:
        raise UserError(
            f"parallel.tensor: {whole[0]} of this {kind} model works on a shard, and its plan does not "
            f"sum its gradient over the tensor ranks; {_WITHOUT}"
        )
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    if tensor > heads and stage == 3:
        raise UserError(
            f"parallel.tensor: {tensor} ranks are more than the model's {heads} key/value heads, and "
            f"ZeRO stage 3 fails on the empty shards; use {heads} or fewer, or stage 0, 1 or 2"
        )
    for key, value in dropouts(config).items():
        raise UserError(
            f"model.changes.{key}: it is {value}, and under AutoTP ranks with uneven shards would draw "
            f"different masks for what they all hold; use model.changes.{key}=0.0"
        )


def _matching(model: nn.Module, plan: dict[str, str], styles: tuple[str, ...]) -> list[str]:
    """Modules whose weight a plan's entries of these styles name, as DeepSpeed reads them."""
    patterns = [TPPlanConverter._wildcard_to_regex(p) + "$" for p, s in plan.items() if s in styles]
    return [n for n, _ in model.named_modules() if any(re.match(p, n) for p in patterns)]


def _whole_among_shards(model: nn.Module, plan: dict[str, str]) -> list[str]:
    """Parameters beside cut layers in one module (attention, MLP) which no entry of the plan names.

    Each rank computes their gradient from its shard of the activations alone: Apertus' learned
    activation, for example. What the plan calls "replicated_with_grad_allreduce" AutoTP sums.
    """
    cut = _matching(model, plan, ("colwise", "rowwise"))
    summed = _matching(model, plan, ("replicated_with_grad_allreduce",))
    parents = {name.rpartition(".")[0] for name in cut}
    return [
        name
        for name, _ in model.named_parameters()
        if name.rpartition(".")[0] not in {*cut, *summed}
        and any(name.startswith(f"{parent}.") for parent in parents)
    ]


def expose_tp_plan(model: "HFCausalLM") -> None:
    """Give our wrapper what AutoTP looks for on a model. Call it before `deepspeed.initialize`.

    Defect: AutoTP looks for the plan and the key/value heads on the model that it is given, not on the
        transformers model inside. Without them it cuts by the names of layers. That is right for Llama;
        each rank of a Qwen3 keeps its own part of the gradients of q_norm and k_norm, and the ranks
        drift apart.
    Versions: DeepSpeed 0.19.8.
    Workaround: copy the configuration and the plan to the wrapper.
    Proof: test_autotp.py::test_autotp_finds_no_plan_through_a_wrapper
    """
    wrapper: Any = model
    wrapper.config = model.model.config
    wrapper._tp_plan = _get_hf_tp_plan(model.model)
