"""models/layerwise.py: where the layers go, and that the same is computed."""

from dataclasses import replace

import pytest
import torch

from models.config import SIZES
from models.gpt import GPT
from models.init_weights import initialize
from models.layerwise import device_map, spread_over

TIED = replace(SIZES["tiny"], hidden=32, ffn=64, layers=5)
UNTIED = replace(SIZES["tiny_llama"], hidden=32, ffn=64, head_dim=8, layers=5)
A, B = torch.device("cuda", 0), torch.device("cuda", 1)


def test_blocks_go_in_runs_and_tied_ends_stay_together() -> None:
    with torch.device("meta"):
        tied, untied = device_map(GPT(TIED), [A, B]), device_map(GPT(UNTIED), [A, B])
    assert [tied[f"blocks.{i}"].index for i in range(5)] == [0, 0, 0, 1, 1]
    assert tied["embedding"] == tied["output"] == tied["norm"] == A
    assert untied["embedding"] == A
    assert untied["output"] == untied["norm"] == B


def test_more_devices_than_blocks_are_rejected() -> None:
    with torch.device("meta"):
        model = GPT(TIED)
    with pytest.raises(ValueError, match="6 devices are more than the model's 5 blocks"):
        device_map(model, [A] * 6)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_the_spread_model_computes_the_same(config: object) -> None:
    assert isinstance(config, type(TIED))
    tokens = torch.randint(0, config.vocab, (2, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for devices in (1, 3):
        model = GPT(config)
        initialize(model, seed=1)
        run = spread_over(model, [torch.device("cpu")] * devices) if devices > 1 else model
        loss = run(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        assert len(list(run.parameters())) == len(list(model.parameters()))
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, spread in zip(*gradients, strict=True):
        assert plain is not None
        assert torch.equal(plain, spread)
