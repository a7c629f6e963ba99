"""What a rank holds of the training state, under every class that DeepSpeed keeps it in.

Each parameter has an fp32 weight and the optimizer's state, of the same shape (Adam: exp_avg and
exp_avg_sq); with `bf16_optimizer_states` all are in bf16. A rank holds a run of each: all elements at
stage 0, its partition of them under ZeRO. 16-bit weights are no state: they are the fp32 weights, rounded.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from launch.checkpoint.full_weights import canonical_names, unsharded_shape
from launch.checkpoint.regions import Cut, Span
from launch.deepspeed_patches.nvme_checkpoint import in_memory, weights_follow
from launch.errors import UserError
from models.parallel.tensor_parallel import Shard
from models.parallel.topology import Topology
from models.pipeline import TIED_PARAMETER

WEIGHT = "weight"


@dataclass(frozen=True)
class Wanted:
    """What an optimizer's state is to be made of: its tensors by kind, and its count of steps."""

    kinds: frozenset[str]
    step: int | None


@dataclass(frozen=True)
class Run:
    """Consecutive elements of a rank's shard of one parameter.

    Attributes:
        name: canonical.
        cut: how the shard lies in the whole parameter.
        start: the place of the first element in the flattened shard.
        tensors: `[n]` each; views of the state itself: "weight" in fp32, then the optimizer's.
        ours_to_save: False where another rank saves the same elements.
    """

    name: str
    cut: Cut
    start: int
    tensors: Mapping[str, Tensor]
    ours_to_save: bool


class _Names:
    """The parameters of this rank by identity, and which of them it saves."""

    def __init__(self, engine: DeepSpeedEngine, topology: Topology) -> None:
        self.topology = topology
        self.names = {id(p): name for name, p in canonical_names(engine.module).items()}
        self.partitioned = isinstance(
            engine.optimizer,
            DeepSpeedZeroOptimizer_Stage3 | DeepSpeedZeroOptimizer | BF16_Optimizer,
        )

    def run(self, parameter: nn.Parameter, start: int, tensors: Mapping[str, Tensor]) -> Run:
        """A run of `parameter`'s elements."""
        cut, name = cut_of(parameter, self.topology), self.names[id(parameter)]
        place = self.topology.coordinates
        saved_elsewhere = (
            (place["data"] > 0 and not self.partitioned)
            or (place["tensor"] > 0 and cut.shape == cut.local_shape)
            # The last stage's copy of a tied embedding.
            or (place["pipeline"] > 0 and name == TIED_PARAMETER)
        )
        return Run(name, cut, start, tensors, not saved_elsewhere)


def cut_of(parameter: nn.Parameter, topology: Topology) -> Cut:
    """How this rank's shard lies in the whole parameter."""
    local = tuple(getattr(parameter, "ds_shape", parameter.shape))
    shard: Shard | None = getattr(parameter, "shard", None)
    if shard is not None:
        spans = tuple(Span(*place) for place in shard.ranges())
        return Cut(tuple(shard.whole_shape(local)), local, shard.dim, spans)
    auto = getattr(parameter, DS_AUTOTP_UC_META, None)
    if auto is not None and not auto["replicated"]:
        rank, dim, sizes = (
            topology.coordinates["tensor"],
            auto["partition_dim"],
            auto["partition_sizes"],
        )
        span = Span(0, sum(sizes[:rank]), sizes[rank])
        return Cut(unsharded_shape(parameter), local, dim, (span,))
    return Cut.uncut(local)


def held_state(
    engine: DeepSpeedEngine, topology: Topology, wanted: Wanted | None = None
) -> Iterator[list[Run]]:
    """Everything this rank holds, a list at a time: what fits into memory together.

    With `wanted`, the optimizer has this state from now on (a new engine's has none before its first
    step), and what the caller writes into the runs becomes the engine's state and weights.

    Every rank must consume the whole iterator.

    Raises:
        UserError: if the optimizer keeps state that is not of its weights' shape.
    """
    optimizer, names = engine.optimizer, _Names(engine, topology)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        yield from _stage3(optimizer, names, wanted)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        yield from _flat(
            optimizer,
            optimizer.bit16_groups,
            optimizer.single_partition_of_fp32_groups,
            names,
            wanted,
        )
    elif isinstance(optimizer, BF16_Optimizer):
        yield from _flat(
            optimizer, optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, names, wanted
        )
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        yield from _whole(
            optimizer.optimizer, optimizer.fp16_groups, optimizer.fp32_groups, names, wanted
        )
    else:
        groups = [group["params"] for group in optimizer.param_groups]
        yield from _whole(optimizer, groups, groups, names, wanted)


def _whole(
    optimizer: torch.optim.Optimizer,
    groups: list[list[nn.Parameter]],
    masters: list[list[Tensor]],
    names: _Names,
    wanted: Wanted | None,
) -> Iterator[list[Run]]:
    """Stage 0: every tensor whole; `masters` are the fp32 weights, or the parameters themselves."""
    for group, wide in zip(groups, masters, strict=True):
        runs = []
        for parameter, master in zip(group, wide, strict=True):
            if not parameter.requires_grad:  # frozen: ZeRO leaves these out by itself
                continue
            found = _tensors(optimizer, master, wanted)
            runs.append(names.run(parameter, 0, {k: t.view(-1) for k, t in found.items()}))
        yield runs
        if wanted:
            for parameter, master in zip(group, wide, strict=True):
                if parameter is not master:
                    parameter.data.copy_(master.data)


def _flat(
    optimizer: DeepSpeedZeroOptimizer | BF16_Optimizer,
    groups: list[list[Any]],
    masters: list[Tensor],
    names: _Names,
    wanted: Wanted | None,
) -> Iterator[list[Run]]:
    """ZeRO-1 and 2: a group's parameters one after another, and a part of that on each rank."""
    for group, master in zip(groups, masters, strict=True):
        found = _tensors(optimizer.optimizer, master, wanted)
        runs = []
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:  # no element of it is in this rank's part
                continue
            here = mapping.hp_fragment_address
            part = {kind: t.narrow(0, here.start, here.numel) for kind, t in found.items()}
            runs.append(names.run(parameter, mapping.lp_fragment_address.start, part))
        yield runs
    if wanted:
        optimizer.update_lp_params()


def _stage3(
    optimizer: DeepSpeedZeroOptimizer_Stage3, names: _Names, wanted: Wanted | None
) -> Iterator[list[Run]]:
    """ZeRO-3: a part of each parameter on each rank; sub-groups of parameters, also on a disk."""
    optimizer.checkpoint_event_prologue()
    for index, master in in_memory(optimizer):
        found = _tensors(optimizer.optimizer, master, wanted)
        runs = []
        for parameter in optimizer.fp16_groups[index]:
            _, at, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = optimizer._get_param_partition_rank(parameter) * size
            held = min(start + size, parameter.ds_numel) - start  # the rest is padding
            if held > 0:
                part = {kind: t.narrow(0, at, held) for kind, t in found.items()}
                runs.append(names.run(parameter, start, part))
        yield runs
        if wanted:
            weights_follow(optimizer, index)
    optimizer.checkpoint_event_epilogue()


def _tensors(
    optimizer: torch.optim.Optimizer, master: Tensor, wanted: Wanted | None
) -> dict[str, Tensor]:
    """A master weight and its state, by kind."""
    state = optimizer.state[master]
    if wanted:
        muon = _is_muons(optimizer, master)
        kinds = {k for k in wanted.kinds if muon is None or (k == "momentum_buffer") is muon}
        for kind in kinds - {WEIGHT} - state.keys():
            state[kind] = torch.zeros_like(master.data)
        if wanted.step is not None and not muon:
            state["step"] = _count(optimizer, master, wanted.step)
    found = {WEIGHT: master.data}
    for kind, value in state.items():
        if kind == "step" or not torch.is_tensor(value):
            continue
        if value.shape != master.shape:
            raise UserError(
                f"checkpoint.every: {type(optimizer).__name__} keeps '{kind}' in another shape than its "
                "weights, which a checkpoint cannot hold; set it to 0, or use AdamW"
            )
        found[kind] = value.data
    return dict(sorted(found.items()))


def _is_muons(optimizer: torch.optim.Optimizer, master: Tensor) -> bool | None:
    """Whether a weight is Muon's or that of the Adam beside it; None for other optimizers."""
    for group in optimizer.param_groups:
        if "use_muon" in group and any(each is master for each in group["params"]):
            return bool(group["use_muon"])
    return None


def _count(optimizer: torch.optim.Optimizer, master: Tensor, step: int) -> int | Tensor:
    """A count of steps as the optimizer keeps it: torch's as a tensor, DeepSpeed's as a number."""
    optimizer = getattr(optimizer, "aux_optimizer", None) or optimizer  # the Adam beside Muon
    if not type(optimizer).__module__.startswith("torch.optim"):
        return step
    on_device = any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
    return torch.tensor(float(step), device=master.device if on_device else "cpu")


def steps_taken(engine: DeepSpeedEngine) -> int | None:
    """The optimizer's count of steps; None if it keeps none."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    counts = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    return max(counts, default=None)
