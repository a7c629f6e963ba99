"""Conversations, what they are as tokens, and training on them: written out, with nothing of the project.

The tokens are bytes, and a conversation is in ChatML. Nothing is packed: the model sees one
conversation at a time, so that no other can be in its view, and no padding.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

Turns = list[tuple[str, str]]
# Answers of very unequal length, several in one conversation, an empty one, one that no user asked
# for, and letters of more than one byte.
CONVERSATIONS: list[Turns] = [
    [("user", "a?"), ("assistant", "b")],
    [("user", "count"), ("assistant", "one two three four five six seven eight nine ten")],
    [
        ("system", "be short"),
        ("user", "hi"),
        ("assistant", "ho"),
        ("user", "x"),
        ("assistant", "y"),
    ],
    [("user", "é?"), ("assistant", "ñandú"), ("user", "ok"), ("assistant", "")],
    [("assistant", "hello"), ("user", "bye"), ("assistant", "see you")],
    [("user", "a long question, which is not learned, of many words"), ("assistant", "no")],
    [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")],
    [("user", "q"), ("assistant", "w e r t y u i o p")],
]


class Example(NamedTuple):
    """A conversation as bytes, and for each byte 1 if the assistant says it, or ends with it."""

    ids: list[int]
    answer: list[int]


def example(turns: Turns) -> Example:
    """A conversation's tokens in ChatML."""
    ids: list[int] = []
    answer: list[int] = []
    for role, content in turns:
        head = list(f"<|im_start|>{role}\n".encode())
        body = list(f"{content}<|im_end|>".encode())
        ids += head + body + [10]
        answer += [0] * len(head) + [int(role == "assistant")] * len(body) + [0]
    return Example(ids, answer)


def write(file: Path, conversations: list[Turns]) -> str:
    """A jsonl file with a row for each conversation."""
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in turns]}
        for turns in conversations
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    return str(file)


class Trained(NamedTuple):
    """A training run: each step's loss and gradient norm, and the trained weights."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def train(
    model: nn.Module, examples: list[Example], steps: int, rate: float, eps: float
) -> Trained:
    """AdamW on all examples at each step: the mean loss of the answers' tokens over all of them.

    `model` maps ids `[1, n]` to logits, or to an object that has them. The rate is constant, nothing
    is clipped or decayed.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=rate, betas=(0.9, 0.95), eps=eps, weight_decay=0.0
    )
    counted = sum(sum(each.answer) for each in examples)
    losses, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for each in examples:
            output = model(torch.tensor([each.ids]))
            logits = getattr(output, "logits", output)[0].float()
            odds = logits.log_softmax(-1)
            loss = torch.zeros(())
            for place in range(1, len(each.ids)):
                if each.answer[place]:
                    loss = loss - odds[place - 1, each.ids[place]]
            (loss / counted).backward()
            total += float(loss.detach()) / counted
        norms.append(
            math.sqrt(
                sum(float(p.grad.square().sum()) for p in trained.values() if p.grad is not None)
            )
        )
        losses.append(total)
        optimizer.step()
    return Trained(losses, norms, {name: p.detach().clone() for name, p in trained.items()})
