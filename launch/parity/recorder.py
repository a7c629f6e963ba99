"""Record what a run computes on its way: activations, gradients, weights, step by step.

`scripts/parity.py --bisect` runs the reference and the layout with a recorder each, and
`launch/parity/bisect.py` compares the two. Both use the same names: those of the modules and
parameters on one device.

A module's input and output each become a view of their own, and the gradient that arrives at the
view is the gradient of this input or output alone. (A hook on the tensor itself would see the sum
over all modules that use it.) Outside the model's forward pass nothing is recorded, so activation
checkpointing shows its first pass only, and its gradients.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META
from torch import Tensor, nn

from launch.checkpoint.full_weights import canonical_names
from launch.config.schema import Train
from launch.data.batch import Batch, MicroBatch
from launch.parity.reference import Reference
from launch.training.train_step import StepResult

BEFORE = "weights before"  # the first step, and buffers
PHASES = (  # in the order in which a step computes them
    BEFORE,
    "batch",
    "forward",
    "loss",
    "backward",
    "parameter gradients",
    "grad norm",
    "learning rate",
    "first moments",
    "weights",
)
INPUT, OUTPUT = "its input", "its output"
MICRO_BATCH, STEP = "of a micro batch", "of the step"


class Key(NamedTuple):
    """What a recorded tensor is. Steps count from 1, micro batches of a rank from 0."""

    step: int
    phase: str
    name: str
    quantity: str = ""
    micro_batch: int = 0


class Cut(NamedTuple):
    """How a weight is sharded along `dim` over the tensor ranks.

    Either `parts`, as in `models/parallel/tensor_parallel.py`, each divided evenly; or the `sizes`
    of the ranks' shards.
    """

    dim: int
    parts: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass
class Recording:
    """The tensors of a run on one device, or of one rank of a layout, in fp32 on the CPU.

    `place` is the rank's coordinate and the size of each axis of the grid; empty for one device.
    """

    tensors: dict[Key, Tensor] = field(default_factory=dict)
    cuts: dict[str, Cut] = field(default_factory=dict)
    place: dict[str, tuple[int, int]] = field(default_factory=dict)


class Recorder:
    """Fills a `Recording`. `step` is the current one; `scale` multiplies recorded gradients."""

    def __init__(self, scale: float = 1.0) -> None:
        self.recording = Recording()
        self.scale = scale
        self.step = 0
        self.micro_batch = -1
        self._inside = False
        self._calls: Counter[str] = Counter()
        self._entered: Counter[int | None] = Counter()  # forward passes of the step, by model chunk

    def begin(self, step: int) -> None:
        """Start a step."""
        self.step, self.micro_batch = step, -1
        self._entered.clear()

    def put(
        self,
        phase: str,
        name: str,
        tensor: Tensor | float,
        quantity: str = "",
        micro_batch: int = 0,
        step: int | None = None,
    ) -> None:
        """Keep a copy of a tensor or number."""
        key = Key(self.step if step is None else step, phase, name, quantity, micro_batch)
        copied = torch.as_tensor(tensor).detach().to("cpu", copy=True)
        self.recording.tensors[key] = copied.float() if copied.is_floating_point() else copied

    def put_batch(self, **fields: Tensor | None) -> None:
        """Keep what the model is given in this micro batch: fields of a `MicroBatch`.

        None stands for what it means: each label counts 1, each row is one document.
        """
        for name, tensor in fields.items():
            if tensor is None:
                tokens = next(t for t in fields.values() if t is not None)
                weights = name == "loss_weights"
                tensor = (
                    torch.ones(tokens.shape)
                    if weights
                    else torch.arange(tokens.shape[1]).expand_as(tokens)
                )
            self.put("batch", name.replace("_", " "), tensor, micro_batch=self.micro_batch)

    def put_buffers(self, model: nn.Module) -> None:
        """Keep a model's initial buffers, such as the frequencies of rotary positions."""
        for name, buffer in model.named_buffers():
            self.put(BEFORE, name, buffer, step=1)

    def watch(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        """Record the inputs and outputs of `modules`, and their gradients, when `root` runs."""
        root.register_forward_pre_hook(self._enter)
        for name, module in modules.items():
            module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True)
            # Before transformers' own hooks, which a model that has run before has by now: what they
            # take for the router's loss is the view too, or its gradient would not be seen.
            module.register_forward_hook(partial(self._after, name), prepend=True)
        root.register_forward_hook(self._leave)

    def _enter(self, root: nn.Module, inputs: Any) -> None:
        if root.training:
            self._inside = True
            # The model chunks of a pipeline stage take micro batches in turns.
            chunk = getattr(root, "chunk", None)
            self.micro_batch = self._entered[chunk]
            self._entered[chunk] += 1
            self._calls.clear()

    def _leave(self, root: nn.Module, inputs: Any, output: Any) -> None:
        self._inside = False

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self._inside:
            return None
        self._calls[name] += 1
        return self.see(self._call(name), INPUT, (args, kwargs))

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        return self.see(self._call(name), OUTPUT, output) if self._inside else None

    def _call(self, name: str) -> str:
        # A module that is called several times in a forward pass.
        return name if self._calls[name] < 2 else f"{name} (call {self._calls[name]})"

    def see(self, name: str, quantity: str, value: Any) -> Any:
        """Record the first floating-point tensor in `value`; return `value` with a view of it."""
        tensor = _first_tensor(value)
        if tensor is None:
            return None
        micro_batch, step = self.micro_batch, self.step
        self.put("forward", name, tensor, quantity, micro_batch)
        if not tensor.requires_grad:
            return None
        view = tensor.view_as(tensor)

        def keep(gradient: Tensor) -> None:
            scaled = gradient.float() * self.scale
            self.put("backward", name, scaled, f"gradient of {quantity}", micro_batch, step)

        view.register_hook(keep)
        return _replaced(value, tensor, view)


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return None
    return next((found for v in value if (found := _first_tensor(v)) is not None), None)


def _replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    if value is old:
        return new
    if type(value) in (tuple, list):
        return type(value)(_replaced(v, old, new) for v in value)
    if type(value) is dict:
        return {key: _replaced(v, old, new) for key, v in value.items()}
    return value  # a class of its own, in which we replace nothing: its gradient is not seen


def modules_to_watch(model: nn.Module) -> dict[str, nn.Module]:
    """All modules below a model by their names on one device."""
    return {name: module for name, module in model.named_modules() if name}


def cut_of(parameter: object) -> Cut | None:
    """How this rank's parameter is sharded over the tensor ranks; None: it is not."""
    shard: Any = getattr(parameter, "shard", None)
    if shard is not None:
        return Cut(shard.dim, tuple(shard.parts))
    meta = getattr(parameter, DS_AUTOTP_UC_META, None)
    if meta is None or meta["replicated"]:
        return None
    return Cut(meta["partition_dim"], sizes=tuple(meta["partition_sizes"]))


class RecordedReference(Reference):
    """The reference, which fills a recorder."""

    def __init__(
        self, recorder: Recorder, model: nn.Module, ds_config: dict[str, Any], train: Train
    ) -> None:
        super().__init__(model, ds_config, train)
        self.recorder = recorder
        self.recorder.watch(self.model, modules_to_watch(self.model))
        self._put_weights(BEFORE, step=1)
        self.total = 1.0
        self._right_loss = self.loss
        self.loss = self._recorded_loss

    def train_step(self, batch: Batch) -> StepResult:
        """As `Reference.train_step`."""
        self.recorder.begin(self.step_number + 1)
        self.total = batch.total_weight
        result = super().train_step(batch)
        put_results(self.recorder, result)
        for name, master in self._named_masters():
            state = self.state_of(master)
            if "exp_avg" in state:
                self.recorder.put("first moments", name, state["exp_avg"])
        self._put_weights("weights")
        return result

    def clip_gradients(self) -> Tensor:
        """As `Reference.clip_gradients`."""
        for name, master in self._named_masters():
            if master.grad is not None:
                self.recorder.put("parameter gradients", name, master.grad)
        return super().clip_gradients()

    def _recorded_loss(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        loss = self._right_loss(model, batch)
        self.recorder.put_batch(**batch._asdict())
        micro_batch = self.recorder.micro_batch
        self.recorder.put("loss", "loss", loss / self.total, MICRO_BATCH, micro_batch)
        return loss

    def _named_masters(self) -> list[tuple[str, Tensor]]:
        return list(zip(canonical_names(self.model), self.masters, strict=True))

    def _put_weights(self, phase: str, step: int | None = None) -> None:
        if phase == BEFORE:
            self.recorder.put_buffers(self.model)
        for name, master in self._named_masters():
            self.recorder.put(phase, name, master, step=step)


def put_results(recorder: Recorder, result: StepResult) -> None:
    """Keep the numbers of a step."""
    recorder.put("loss", "loss", result.loss, STEP)
    recorder.put("grad norm", "grad norm", result.grad_norm)
    recorder.put("learning rate", "learning rate", torch.tensor(result.learning_rate).double())
