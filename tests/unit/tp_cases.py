"""What the tests of tensor parallelism share: layers and models on ranks, next to those of one rank.

The comparisons return how far each tensor is from the expected one, relative to its norm, so that
the same ones serve the tests that expect nothing and the seeded faults that expect much.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.config import GPTConfig
from models.gpt import GPT
from models.init_weights import initialize
from models.parallel.grid import Grid
from models.parallel.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    Shard,
    VocabParallelEmbedding,
)
from models.parallel.topology import TensorParallel, Topology

Distances = dict[str, float]

BATCH, SEQUENCE, WIDTH = 2, 8, 16
LAYERS = 2

# 97 words: neither 2 nor 4 ranks divide them.
GPT2 = GPTConfig(layers=LAYERS, hidden=32, heads=4, vocab=97, context=SEQUENCE)
LLAMA = GPTConfig(
    layers=LAYERS, hidden=32, heads=8, kv_heads=2, ffn=40, vocab=97, context=SEQUENCE,
    position="rope", norm="rmsnorm", mlp="swiglu", bias=False, tied=False,
)  # fmt: skip
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "one key/value head": replace(LLAMA, kv_heads=1),
    # Heads are wider than hidden / heads, as in Qwen3 0.6B.
    "qwen3": replace(LLAMA, head_dim=8, qk_norm=True, tied=True),
}


def start() -> dist.ProcessGroup:
    """Start this rank; the group is one that anybody would make."""
    dist.init_process_group("gloo")
    group = dist.new_group(list(range(dist.get_world_size())))
    assert isinstance(group, dist.ProcessGroup)
    return group


def apart(found: Tensor, expected: Tensor) -> float:
    """The distance of two tensors, relative to the expected one's norm."""
    assert found.shape == expected.shape, f"{list(found.shape)} is not {list(expected.shape)}"
    scale = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / (scale or 1.0)


def of_all_ranks(x: Tensor) -> list[Tensor]:
    """This tensor of every rank."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return parts


def load(module: nn.Module, reference: nn.Module) -> None:
    """This rank's part of the reference's parameters, by their names."""
    whole = dict(reference.named_parameters())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            shard: Shard | None = getattr(parameter, "shard", None)
            parameter.copy_(shard.cut(whole[name]) if shard else whole[name])


def gradients_apart(module: nn.Module, reference: nn.Module) -> Distances:
    """Every parameter's gradient, merged; and how far those that are not cut differ over the ranks."""
    found: Distances = {}
    whole = dict(reference.named_parameters())
    named = dict(module.named_parameters())
    # A fault may have cut a gradient off.
    owns = [torch.zeros_like(p) if p.grad is None else p.grad for p in named.values()]
    sizes = [own.numel() for own in owns]
    ranks = of_all_ranks(torch.cat([own.flatten() for own in owns]))  # one message, not one each
    pieces = zip(*(rank.split(sizes) for rank in ranks), strict=True)
    for (name, parameter), own, flat in zip(named.items(), owns, pieces, strict=True):
        expected = whole.pop(name).grad
        assert expected is not None
        shard: Shard | None = getattr(parameter, "shard", None)
        gathered = [piece.view_as(own) for piece in flat]
        found[name] = apart(shard.merge(gathered) if shard else own, expected)
        if not shard:
            found[f"copies of {name}"] = max(apart(copy, gathered[0]) for copy in gathered)
    assert not whole, f"without a peer: {list(whole)}"
    return found


def column_apart(
    group: dist.ProcessGroup,
    parts: Sequence[int],
    *,
    bias: bool = True,
    sequence_parallel: bool = False,
    pad: bool = False,
) -> Distances:
    """ColumnParallelLinear and nn.Linear. Each rank's loss is about its own outputs."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    plain = nn.Linear(WIDTH, sum(parts), bias)
    layer = ColumnParallelLinear(WIDTH, parts, bias, group, sequence_parallel, pad)
    load(layer, plain)
    x = torch.randn(BATCH, SEQUENCE, WIDTH, requires_grad=True)
    slope = torch.randn(BATCH, SEQUENCE, sum(parts))
    expected = plain(x)
    (expected * slope).sum().backward()
    assert x.grad is not None
    outputs = Shard(2, tuple(parts), rank, size)
    here = x.chunk(size, 1)[rank] if sequence_parallel else x
    grad = x.grad.chunk(size, 1)[rank] if sequence_parallel else x.grad
    mine = here.detach().clone().requires_grad_()
    y = layer(mine)
    (y * outputs.cut(slope)).sum().backward()
    assert mine.grad is not None
    found = {"output": apart(y, outputs.cut(expected)), "input": apart(mine.grad, grad)}
    return found | gradients_apart(layer, plain)


def row_apart(
    group: dist.ProcessGroup, *, bias: bool = True, sequence_parallel: bool = False
) -> Distances:
    """RowParallelLinear and nn.Linear. The loss is the same on all ranks, or about a rank's tokens."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    plain = nn.Linear(WIDTH, 12, bias)
    layer = RowParallelLinear(WIDTH, 12, bias, group, sequence_parallel)
    load(layer, plain)
    x = torch.randn(BATCH, SEQUENCE, WIDTH, requires_grad=True)
    slope = torch.randn(BATCH, SEQUENCE, 12)
    expected = plain(x)
    (expected * slope).sum().backward()
    assert x.grad is not None
    if sequence_parallel:
        expected, slope = expected.chunk(size, 1)[rank], slope.chunk(size, 1)[rank]
    mine = x.chunk(size, 2)[rank].detach().clone().requires_grad_()
    y = layer(mine)
    (y * slope).sum().backward()
    missing = torch.zeros_like(mine)
    found = {
        "output": apart(y, expected),
        "input": apart(missing if mine.grad is None else mine.grad, x.grad.chunk(size, 2)[rank]),
    }
    return found | gradients_apart(layer, plain)


def embedding_apart(group: dist.ProcessGroup, vocab: int) -> Distances:
    """VocabParallelEmbedding and nn.Embedding. The loss is the same on all ranks."""
    torch.manual_seed(0)
    plain = nn.Embedding(vocab, WIDTH)
    layer = VocabParallelEmbedding(vocab, WIDTH, group)
    load(layer, plain)
    tokens = torch.cat((torch.arange(vocab), torch.randint(0, vocab, (vocab,)))).view(2, vocab)
    slope = torch.randn(2, vocab, WIDTH)
    expected, y = plain(tokens), layer(tokens)
    (expected * slope).sum().backward()
    (y * slope).sum().backward()
    return {"output": apart(y, expected)} | gradients_apart(layer, plain)


def make_tp(config: GPTConfig, sequence_parallel: bool = False) -> TensorParallel:
    """All ranks as one tensor group, as the model wants it."""
    size = dist.get_world_size()
    topology = Topology(Grid(tensor=size), sharing_key_values=max(1, size // config.kv_heads))
    return topology.tensor_parallel(sequence_parallel)


def reference_gpt(config: GPTConfig) -> GPT:
    """A model on one rank, with no bias at 0 and no norm at 1: those would hide a missing term."""
    model = GPT(config)
    initialize(model, 1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def tokens_and_labels(vocab: int) -> tuple[Tensor, Tensor]:
    """`[BATCH, SEQUENCE]` each, the same on every rank."""
    drawn = torch.randint(
        0, vocab, (2, BATCH, SEQUENCE), generator=torch.Generator().manual_seed(5)
    )
    return drawn[0], drawn[1]


def gpt_apart(
    config: GPTConfig,
    tp: TensorParallel,
    checkpoint_activations: bool = False,
    fault: AbstractContextManager[Any] | None = None,
) -> Distances:
    """Loss, logits and every gradient of a GPT over ranks, and of one on this rank.

    Gradients are those of the loss and of a function of the logits, which are gathered otherwise.
    `fault` is in force while the model over ranks is loaded and runs.
    """
    tokens, labels = tokens_and_labels(config.vocab)
    reference = reference_gpt(config)
    slope = torch.randn(BATCH, SEQUENCE, config.vocab, generator=torch.Generator().manual_seed(6))
    loss, logits = reference(tokens, labels), reference(tokens)
    (loss + (logits * slope).mean()).backward()
    with fault or nullcontext():
        model = GPT(config, checkpoint_activations, tp)
        load(model, reference)
        our_loss, our_logits = model(tokens, labels), model(tokens)
        (our_loss + (our_logits * slope).mean()).backward()
    found = {"loss": apart(our_loss, loss), "logits": apart(our_logits, logits)}
    return found | gradients_apart(model, reference)
