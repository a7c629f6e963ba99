"""Compiled code computes GELU with a sigmoid: it is torch's own, but for rounding."""

import pytest
import torch
import torch.nn.functional as F

from models.gpt import gelu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_of_compiled_code_is_torchs(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and slopes, out to where the one and the other are 0 and 1."""
    x = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    exact = x.to(dtype).double().requires_grad_()
    expected = F.gelu(exact, approximate="tanh")
    expected.sum().backward()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    ours = x.to(dtype).requires_grad_()
    found = gelu(ours)
    assert found.dtype is dtype
    found.double().sum().backward()
    assert ours.grad is not None and exact.grad is not None
    for one, other in ((found.double(), expected), (ours.grad.double(), exact.grad)):
        torch.testing.assert_close(one, other, rtol=torch.finfo(dtype).eps, atol=4e-6)
