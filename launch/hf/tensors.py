"""Which tensors of a transformers model make up each of ours, and the change of layout both ways."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from launch.errors import UserError
from launch.hf.families import Family
from models.config import GPTConfig
from models.gpt import GPT

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Correspondence:
    """One of our tensors and those of a family that it is made of.

    `rows` are the output features of each of theirs; in ours they lie one after the other along
    the first dimension. With `transposed`, theirs is `[in, out]`; with `heads` above 0, its rows
    are each head's query, key and value in turn.
    """

    ours: str
    shape: Shape
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    transposed: bool
    heads: int = 0

    def their_shapes(self) -> dict[str, Shape]:
        """The shape of each of the family's tensors."""
        shapes = [(rows, *self.shape[1:]) for rows in self.rows]
        return {
            name: shape[::-1] if self.transposed else shape
            for name, shape in zip(self.theirs, shapes, strict=True)
        }

    def to_theirs(self, ours: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Split one of our tensors into the family's."""
        if self.heads:
            ours = ours.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)
        for name, part in zip(self.theirs, ours.split(self.rows), strict=True):
            yield name, part.t() if self.transposed else part

    def to_ours(self, read: Callable[[str], Tensor]) -> Tensor:
        """Our tensor, from the family's, which `read` returns by name."""
        first = read(self.theirs[0])
        if len(self.theirs) == 1:
            if self.heads:
                by_part: Tensor = first.unflatten(0, (self.heads, 3, -1)).transpose(0, 1)
                return by_part.flatten(0, 2)
            return first.t() if self.transposed else first
        whole = torch.empty(self.shape, dtype=first.dtype)
        del first
        for name, place in zip(self.theirs, whole.split(self.rows), strict=True):
            place.copy_(read(name))  # one at a time: each may be large
        return whole


def our_shapes(config: GPTConfig) -> dict[str, Shape]:
    """Shapes of a decoder's parameters on one device, by canonical name and in model order."""
    with torch.device("meta"):
        model = GPT(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def correspondences(family: Family, config: GPTConfig) -> list[Correspondence]:
    """How each of a decoder's parameters corresponds to a family's tensors, in our model's order."""
    key_value = config.kv_heads * config.head_dim
    fused = {
        "attention.qkv": (config.heads * config.head_dim, key_value, key_value),
        "mlp.up": (config.ffn, config.ffn),
    }
    layers = {layer.ours: layer for layer in family.layers}
    found = []
    for name, shape in our_shapes(config).items():
        module, _, kind = name.rpartition(".")
        block = re.match(r"blocks\.(\d+)\.", name)
        number = block[1] if block else ""
        layer = layers[re.sub(r"^blocks\.\d+\.", "blocks.{i}.", module)]
        theirs = tuple(f"{their.format(i=number)}.{kind}" for their in layer.theirs)
        rows = (shape[0],) if len(theirs) == 1 else fused[layer.ours.removeprefix("blocks.{i}.")]
        transposed = layer.transposed and len(shape) == 2
        heads = config.heads if layer.by_head else 0
        found.append(Correspondence(name, shape, theirs, rows, transposed, heads))
    return found


def names_in_files(family: Family, found: Iterable[str], where: str) -> dict[str, str]:
    """The name in a file of each tensor, by the name that transformers gives it.

    Old files leave out the prefix of the model without its head, and hold constants that the
    model's code computes; those are left out here.

    Raises:
        UserError: if two tensors of the files have one name.
    """
    names: dict[str, str] = {}
    for name in found:
        full = (
            name
            if name.startswith((family.base_prefix, family.head))
            else family.base_prefix + name
        )
        if any(re.fullmatch(constant, full) for constant in family.constants):
            continue
        if full in names:
            raise UserError(f"{where}: {name} and {names[full]} are the same tensor")
        names[full] = name
    return names


def check_shapes(expected: dict[str, Shape], found: dict[str, Shape], where: str) -> None:
    """Check that files hold the tensors of a model and no others, in their shapes.

    Raises:
        UserError: naming the first tensor that is missing, unknown or of another shape.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing:
        raise UserError(f"{where}: {missing[0]} is missing{_and_others(missing)}")
    if unknown:
        raise UserError(
            f"{where}: nothing in the model uses {unknown[0]}{_and_others(unknown)}; files of "
            "another model?"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(
                f"{where}: {name} is {list(found[name])}, and the model's is {list(shape)}"
            )


def _and_others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
