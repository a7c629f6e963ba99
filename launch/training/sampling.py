"""Generate text: next-token sampling without a key/value cache.

Every token recomputes the whole context. That is slow for long texts but works for every model and
layout with a forward pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from launch.data.tokenizer import Tokenizer


@torch.no_grad()
def sample(
    logits: Callable[[Tensor], Tensor],
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    context: int,
    device: torch.device,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """Continue `prompt` by up to `tokens` tokens, stopping early at the document separator.

    `logits` maps `[1, sequence]` token ids to `[1, sequence, vocab]`. Temperature 0 takes the most
    likely token. The generator is on the CPU: the same seed draws the same numbers on any device.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt) or [tokenizer.separator]
    for _ in range(tokens):
        window = torch.tensor([ids[-context:]], device=device)
        # The model's vocabulary may be padded beyond the tokenizer's; never sample padding.
        scores = logits(window)[0, -1, : tokenizer.vocab_size].float().cpu()
        if temperature == 0:
            chosen = int(scores.argmax())
        else:
            best = scores.topk(min(top_k, len(scores)))
            odds = torch.softmax(best.values / temperature, dim=0)
            chosen = int(best.indices[torch.multinomial(odds, 1, generator=generator)])
        if chosen == tokenizer.separator:
            break
        ids.append(chosen)
    return tokenizer.decode(ids)
