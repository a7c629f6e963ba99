"""Raw AutoTP shows each defect that `launch/deepspeed_patches/autotp.py` works around or rejects.

A test here fails once DeepSpeed has repaired the defect; its message names the workaround to remove.
"""

import pytest

from tests.deepspeed_patches.raw import initialize, repaired, start
from tests.ranks import run_ranks


def gradient_on_each_rank(kind: str, wrapped: bool, name: str) -> list[float]:
    """The gradient of a parameter that every tensor rank holds whole."""
    import torch
    from deepspeed.utils import safe_get_full_grad
    from transformers import AutoConfig, AutoModelForCausalLM

    start()
    sizes = {
        "vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    known = AutoConfig.for_model(kind)
    sizes = {key: value for key, value in sizes.items() if hasattr(known, key)}
    torch.manual_seed(0)
    inner = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            logits = self.inner(input_ids=tokens).logits
            loss: torch.Tensor = logits.log_softmax(-1)[..., 0].sum()
            return loss

    model = Wrapper()
    if not wrapped:  # AutoTP looks for these on the model that it is given
        model.config, model._tp_plan = inner.config, inner._tp_plan
    engine = initialize(model, {
        "tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": 1},
    })  # fmt: skip
    engine.backward(engine(torch.arange(4)[None]))
    whole = safe_get_full_grad(dict(inner.named_parameters())[name])
    gradient: list[float] = whole.flatten().tolist()
    return gradient


Q_NORM = "model.layers.0.self_attn.q_norm.weight"


def test_autotp_finds_no_plan_through_a_wrapper() -> None:
    first, second = run_ranks(gradient_on_each_rank, 2, "qwen3", True, Q_NORM)
    assert first != pytest.approx(second, rel=1e-3), repaired("autotp.expose_tp_plan")
    first, second = run_ranks(gradient_on_each_rank, 2, "qwen3", False, Q_NORM)
    assert first == pytest.approx(second, rel=1e-5)


def test_autotp_leaves_parameters_of_apertus_out() -> None:
    name = "model.layers.0.mlp.act_fn.alpha_p"
    first, second = run_ranks(gradient_on_each_rank, 2, "apertus", False, name)
    assert first != pytest.approx(second, rel=1e-3), repaired("autotp.check_plan")
