"""Cross entropy over a vocabulary sharded over tensor ranks."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from models.parallel.collectives import Group, all_reduce, group_rank, group_size


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over all tokens of -log p(label), in fp32: `[..., vocab]` and `[...]` to a scalar.

    bf16 has 8 bits of precision: a loss computed in it moves in steps of about 0.4%.

    Args:
        logits: `[..., vocab]`.
        labels: `[...]` token ids.
        weights: `[...]`, the weight of each token's loss; None: all 1.
    """
    scores, ids = logits.float().flatten(0, -2), labels.flatten()
    if weights is None:
        return F.cross_entropy(scores, ids, reduction="sum")
    return F.cross_entropy(scores, ids, reduction="none").dot(weights.flatten())


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        vocab: int,
        group: dist.ProcessGroup,
    ) -> Tensor:
        width = logits.shape[-1]
        first = group_rank(group) * width
        scores = logits.float()
        if width * group_size(group) > vocab:  # padding columns, on the last rank, are not tokens
            padding = torch.arange(first, first + width, device=logits.device) >= vocab
            scores = scores.masked_fill(padding, -torch.inf)
        largest = all_reduce(scores.amax(-1), group, maximum=True)
        odds = (scores - largest.unsqueeze(-1)).exp()
        total = odds.sum(-1)
        mine = (labels >= first) & (labels < first + width)
        column = (labels - first).clamp(0, width - 1).unsqueeze(-1)
        chosen = torch.where(mine, scores.gather(-1, column).squeeze(-1) - largest, 0.0)
        # One collective for both sums.
        total, chosen = all_reduce(torch.stack((total, chosen)), group)
        ctx.save_for_backward(odds.div_(total.unsqueeze(-1)), mine, column, weights)
        ctx.dtype = logits.dtype
        losses: Tensor = total.log() - chosen
        return (losses if weights is None else losses * weights).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        probabilities, mine, column, weights = ctx.saved_tensors
        # d loss / d logit = weight * (probability - [this is the label]).
        ones = mine.unsqueeze(-1).to(probabilities.dtype)
        change = probabilities.scatter_add(-1, column, -ones)
        scale = gradient if weights is None else gradient * weights.unsqueeze(-1)
        return (change * scale).to(ctx.dtype), None, None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None, vocab: int, group: Group
) -> Tensor:
    """Sum over all tokens of -log p(label), in fp32, from vocab-parallel logits.

    The ranks exchange three numbers per token, never the logits (arXiv:1909.08053, section 3).

    Args:
        logits: `[..., padded vocab / ranks]`; rank r has columns r * width to (r + 1) * width.
        labels: `[...]` token ids, the same on every rank.
        weights: `[...]`, the weight of each token's loss, the same on every rank; None: all 1.
        vocab: the number of real columns; the rest are padding.
        group: the tensor parallel ranks.

    Returns:
        A scalar, the same on every rank.
    """
    if group_size(group) == 1:
        return cross_entropy(logits[..., :vocab], labels, weights)
    apply: Any = _VocabParallelCrossEntropy.apply  # torch does not type it
    total: Tensor = apply(logits, labels, weights, vocab, group)
    return total
