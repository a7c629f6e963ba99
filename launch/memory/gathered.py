"""How many weights ZeRO-3 holds gathered, and when: its coordinator's rules, replayed.

DeepSpeed gathers a module's weights before it runs, prefetches those that come next, and releases a
module's weights after it unless they are used again within `stage3_max_reuse_distance` weights: around
the end of a forward pass, the last layers stay for the backward pass (`partitioned_param_coordinator.py`
of DeepSpeed 0.19.8). Whole blocks are gathered at a time (`launch/training/compile.py`).
"""

from collections import deque
from functools import lru_cache
from typing import Any, NamedTuple

from launch.ds_json.view import zero_block
from launch.memory.shapes import chain, layer_shapes
from launch.memory.state import persistent
from models.config import GPTConfig

_LIVE = _REUSE = 1_000_000_000
_PREFETCH = 50_000_000


class Gathered(NamedTuple):
    """Elements that are gathered beside those that are always whole."""

    forward: int  # at the end of the forward pass
    loss: int  # in the loss's backward pass
    blocks: int  # the most in any block's backward pass
    end: int  # at the end of the backward pass

    @classmethod
    def none(cls) -> "Gathered":
        """Where weights are not partitioned."""
        return cls(0, 0, 0, 0)


def gathered(config: GPTConfig, tensor: int, ds_config: dict[str, Any]) -> Gathered:
    """What a rank holds gathered during the second and later steps; the first records the order."""
    zero = zero_block(ds_config)
    limits = _Limits(
        live=int(zero.get("stage3_max_live_parameters", _LIVE)),
        reuse=int(zero.get("stage3_max_reuse_distance", _REUSE)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", _PREFETCH)),
    )
    return _gathered(config, tensor, persistent(zero), limits)


class _Limits(NamedTuple):
    live: int
    reuse: int
    prefetch: int


class _Module(NamedTuple):
    """A module that DeepSpeed has hooks on, and the indices of its weights that are not small."""

    fetched: list[int]
    below: list[int]  # its own and its submodules'
    block: bool = False  # gathered whole: all of its weights are its submodules'

    @property
    def direct(self) -> list[int]:
        """Those that are not a submodule's."""
        return [] if self.block else self.fetched


@lru_cache(maxsize=256)
def _gathered(config: GPTConfig, tensor: int, small: int, limits: _Limits) -> Gathered:
    sizes, layers = _weights(config, tensor, small)
    token, position, *blocks, norm, output = layers
    chain_of_modules = [
        *(_Module(each, each) for each in (token, position)),
        *(_Module(each, each, block=True) for each in blocks),
        *(_Module(each, each) for each in (norm, output)),
    ]
    # Containers gather nothing, but prefetch.
    model, embedding = _Module([], list(range(len(sizes)))), _Module([], [*token, *position])
    forward = [model, embedding, *chain_of_modules]
    order = [*forward, model, *reversed(chain_of_modules)]
    held = _replay(sizes, order, limits)
    end, later = len(forward), held[len(forward) + 2 : -2]
    return Gathered(held[end - 1], held[end], max([0, *later]), held[-1])


def _weights(config: GPTConfig, tensor: int, small: int) -> tuple[list[int], list[list[int]]]:
    """The sizes of all weights that are not small, and for each layer their indices."""
    sizes: list[int] = []
    layers: list[list[int]] = []
    for name in chain(config):
        if name == "output" and config.tied:
            layers.append(list(layers[0]))
            continue
        found = [s.numel for s in layer_shapes(config, name, tensor) if s.numel > small]
        layers.append(list(range(len(sizes), len(sizes) + len(found))))
        sizes += found
    return sizes, layers


def _replay(sizes: list[int], order: list[_Module], limits: _Limits) -> list[int]:
    """Elements held while each module of `order` runs."""
    queue = deque((weight, step) for step, module in enumerate(order) for weight in module.fetched)
    last_fetch = dict.fromkeys(range(len(sizes)), -1)
    here: set[int] = set()
    held: list[int] = []
    for step, module in enumerate(order):
        here |= set(module.fetched)
        waiting = {weight for weight in module.fetched if last_fetch[weight] < step}
        while queue and waiting:
            weight, last_fetch[weight] = queue.popleft()
            waiting.discard(weight)
        room, coming = min(limits.live - sum(sizes[w] for w in here), limits.prefetch), 0
        while queue and coming < room:
            weight, used = queue.popleft()
            last_fetch[weight] = max(last_fetch[weight], used)
            if weight not in here:
                here.add(weight)
                coming += sizes[weight]
        held.append(sum(sizes[weight] for weight in here))
        soon = _used_soon(sizes, order[step + 1 :], limits.reuse, module.block)
        here -= {w for w in module.fetched if last_fetch[w] <= step + 1} - soon
    return held


def _used_soon(sizes: list[int], order: list[_Module], distance: int, of_a_block: bool) -> set[int]:
    """The weights of the next modules, until these have `distance` elements.

    DeepSpeed looks into submodules if the module to be released is a block, which is gathered whole, and
    not if the next one is: a block finds its weights already in the model's own backward pass.
    """
    found: set[int] = set()
    passed = 0
    for module in order:
        if passed >= distance:
            break
        weights = module.below if of_a_block else module.direct
        found |= set(weights)
        passed += sum(sizes[weight] for weight in weights)
    return found
