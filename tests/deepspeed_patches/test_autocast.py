"""Raw DeepSpeed with torch_autocast rounds what `launch/deepspeed_patches/autocast.py` keeps."""

from typing import Any

from tests.deepspeed_patches.raw import initialize, repaired, start
from tests.ranks import run_ranks

FINE = 1 + 2.0**-12  # an fp32 number between two of bf16


def embedded() -> float:
    """What a tied embedding looks up, at ZeRO-3; its table holds FINE everywhere."""
    import torch
    from torch import nn

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 4)
            nn.init.constant_(self.embedding.weight, FINE)
            self.head = nn.Linear(4, 4, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: torch.Tensor) -> tuple[Any, Any]:
            found = self.embedding(tokens)
            return found, self.head(found)

    start()
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    autocast = {"enabled": True, "dtype": "bfloat16"}
    engine = initialize(Tied(), {"zero_optimization": zero, "torch_autocast": autocast})
    return float(engine(torch.tensor([0]))[0].max())


def test_a_tied_embedding_is_gathered_in_16_bits() -> None:
    found = run_ranks(embedded, 2)
    assert found == [1.0, 1.0], repaired("autocast.keep_tied_parameters_in_their_dtype")
