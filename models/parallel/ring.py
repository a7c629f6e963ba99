"""Messages round a ring of pipeline stages, from the last on to the first, which no sender waits for.

With several model chunks a stage, what a stage sends and what it receives comes in no common order:
a stage whose send waited for its receiver could wait for ever. So each direction between two stages
and each kind of message has a group of its own, in which messages keep their order.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Kind = Literal["forward", "backward"]
KINDS: tuple[Kind, ...] = ("forward", "backward")


@dataclass(frozen=True)
class Link:
    """The way of one kind of message from a rank to another."""

    source: int
    target: int
    group: dist.ProcessGroup


@dataclass
class Ring:
    """A rank's links: activations go to the next stage, gradients to the one before.

    Attributes:
        links: those that end at this rank, in an order that all ranks share.
        out: of each kind, the link that messages leave on.
        into: of each kind, the link that they come in on.
    """

    links: list[Link] = field(default_factory=list)
    out: dict[Kind, Link] = field(default_factory=dict)
    into: dict[Kind, Link] = field(default_factory=dict)
    _sent: list[tuple[dist.Work, Tensor]] = field(default_factory=list)

    def connect(self, device: torch.device) -> None:
        """Send one number over each link: at a first message, NCCL connects two ranks, and both wait."""
        number = torch.zeros(1, device=device)
        for link in self.links:
            if link.source == dist.get_rank():
                dist.send(number, link.target, link.group)
            else:
                dist.recv(number, link.source, link.group)

    def send(self, kind: Kind, tensor: Tensor) -> None:
        """Send a tensor without waiting for its receiver; it is kept until it has left."""
        link = self.out[kind]
        self._sent = [(work, sent) for work, sent in self._sent if not work.is_completed()]
        tensor = tensor.contiguous()
        work = dist.isend(tensor, link.target, link.group)
        assert work is not None
        self._sent.append((work, tensor))

    def receive(self, kind: Kind, like: Tensor) -> Tensor:
        """The next tensor of a kind, of the shape and dtype of `like`."""
        link = self.into[kind]
        received = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(received, link.source, link.group)
        return received

    def wait(self) -> None:
        """Wait until all that was sent has left."""
        for work, _ in self._sent:
            work.wait()
        self._sent = []


def make_ring(groups: list[list[int]]) -> Ring:
    """This rank's links. Collective: every rank makes every link of every ring.

    `groups` are the pipelines' ranks, stage by stage.
    """
    ring, here = Ring(), dist.get_rank()
    for ranks in groups:
        following = [*ranks[1:], ranks[0]]
        for kind in KINDS:
            for rank, neighbour in zip(ranks, following, strict=True):
                ends = (rank, neighbour) if kind == "forward" else (neighbour, rank)
                link = Link(*ends, dist.new_group(list(ends)))
                if here in ends:
                    ring.links.append(link)
                if link.source == here:
                    ring.out[kind] = link
                if link.target == here:
                    ring.into[kind] = link
    return ring
