"""Record what one rank of a layout computes; see `recorder.py`."""

import json
from pathlib import Path
from typing import Any

from deepspeed.utils import safe_get_full_grad, safe_get_full_optimizer_state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from launch.checkpoint.full_weights import canonical_names, held_weights, is_hf, master_weights
from launch.data.batch import MicroBatch
from launch.deepspeed_patches.optimizer_state import link_every_group
from launch.ds_json.view import block
from launch.parity.recorder import (
    BEFORE,
    MICRO_BATCH,
    OUTPUT,
    Cut,
    Key,
    Recorder,
    Recording,
    cut_of,
    modules_to_watch,
    put_results,
)
from launch.training.setup import LocalEngine
from launch.training.train_step import StepResult
from models.gpt import GPT, MLP
from models.pipeline import GPTPipeline


class LayoutRecorder(Recorder):
    """Records a rank's engine. To make one is collective, and so is `end`.

    DeepSpeed averages gradients over the data parallel ranks: before that, each rank's are as many
    times too large as there are such ranks. In fp16, gradients are scaled until the optimizer steps.
    """

    def __init__(self, local: LocalEngine) -> None:
        grid = local.topology.grid
        super().__init__(scale=1.0 / grid["data"])
        self.engine: Any = local.engine
        fp16 = block(local.plan.ds_config, "fp16")
        self.loss_scale = float(fp16["loss_scale"]) if fp16.get("enabled") else 1.0
        self.shares = local.plan.layout.accumulation * grid["data"]
        places = local.topology.coordinates
        self.recording.place = {axis: (places[axis], size) for axis, size in grid.items()}
        model: nn.Module = self.engine.module
        if isinstance(model, GPTPipeline):
            self._watch_stage(model)
        else:
            self._watch_whole(model)
        for name, parameter in canonical_names(model).items():
            self._put_cut(name, parameter)
        self.put_buffers(model.model if is_hf(model) else model)
        self._put_weights(BEFORE, step=1)
        take_model_step = self.engine._take_model_step

        def recorded(*arguments: Any) -> None:
            self._put_gradients()
            take_model_step(*arguments)

        self.engine._take_model_step = recorded

    def end(self, result: StepResult) -> None:
        """Record what a step has left."""
        put_results(self, result)
        for name, moment in self._first_moments():
            self.put("first moments", name, moment)
        self._put_weights("weights")

    def save(self, folder: Path, rank: int) -> None:
        """Write the recording for `load_recording`."""
        found = self.recording
        tensors = {json.dumps(key): tensor.contiguous() for key, tensor in found.tensors.items()}
        save_file(tensors, folder / f"rank{rank}.safetensors")
        (folder / f"rank{rank}.json").write_text(json.dumps([found.cuts, found.place]))

    def _watch_whole(self, model: nn.Module) -> None:
        modules = modules_to_watch(model.model if is_hf(model) else model)
        self._leave_out_shared_keys(modules)
        for name in _in_chunks(model):
            # One device computes at once what these do in chunks: what they are part of is seen.
            del modules[name]
        self.watch(model, modules)
        model.register_forward_pre_hook(
            lambda m, given: self.put_batch(**MicroBatch(*given)._asdict())
        )
        for name, module in modules.items():
            self._put_cut(name, getattr(module, "weight", None))
        backward = self.engine.backward

        def recorded(loss: Tensor, *arguments: Any, **settings: Any) -> Any:
            self._put_loss(loss)
            return backward(loss, *arguments, **settings)

        self.engine.backward = recorded

    def _watch_stage(self, model: GPTPipeline) -> None:
        last = model.stage_id == model.num_stages - 1
        modules = {
            model.canonical_name(name): module
            for name, module in model.named_modules()
            if name not in ("", "tied_modules")
        }
        self._leave_out_shared_keys(modules)
        if last and model.config.tied:
            # The last layer is a function of the embedding's weight, not a module.
            model.register_forward_hook(
                lambda m, given, out: self.see("output", OUTPUT, out) if m.at_end() else None
            )
            self._put_cut("output", model.tied_modules["token"].weight)
        self.watch(model, modules)
        for name, module in modules.items():
            self._put_cut(name, getattr(module, "weight", None))
        if model.stage_id == 0:
            model.register_forward_pre_hook(
                lambda m, given: self._put_stage_input(given[0]) if m.at_start() else None
            )
        if last:
            right = model.loss_fn

            def recorded(logits: Tensor, target: tuple[Tensor, ...]) -> Tensor:
                labels, _, *weights = target
                self.put_batch(labels=labels, loss_weights=weights[0] if weights else None)
                loss: Tensor = right(logits, target)
                self._put_loss(loss)
                return loss

            model.loss_fn = recorded

    def _leave_out_shared_keys(self, modules: dict[str, nn.Module]) -> None:
        # Ranks that share a key head each have the gradient of their own queries alone.
        if getattr(getattr(self.engine.module, "tp", None), "key_value_group", None) is not None:
            for name in [name for name in modules if name.endswith("key_norm")]:
                del modules[name]

    def _put_stage_input(self, given: Any) -> None:
        tokens, positions = given if isinstance(given, tuple) else (given, None)
        self.put_batch(tokens=tokens, positions=positions)

    def _put_loss(self, loss: Tensor) -> None:
        self.put("loss", "loss", loss / self.shares, MICRO_BATCH, self.micro_batch)

    def _put_cut(self, name: str, parameter: object) -> None:
        if cut := cut_of(parameter):
            self.recording.cuts[name] = cut

    def _put_weights(self, phase: str, step: int | None = None) -> None:
        for name, held in held_weights(self.engine).items():
            self.put(phase, name, held(), step=step)

    def _put_gradients(self) -> None:
        for name, parameter in canonical_names(self.engine.module).items():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                self.put("parameter gradients", name, gradient.float() / self.loss_scale)

    def _first_moments(self) -> list[tuple[str, Tensor]]:
        link_every_group(self.engine)
        masters = {id(weight): master for weight, master in master_weights(self.engine)}
        optimizer = self.engine.optimizer
        states = getattr(optimizer, "optimizer", optimizer).state
        found = []
        for name, parameter in canonical_names(self.engine.module).items():
            moment = safe_get_full_optimizer_state(parameter, "exp_avg")
            if moment is None:  # stage 0 has it where torch has it
                moment = states[masters.get(id(parameter), parameter)].get("exp_avg")
            if moment is not None:
                found.append((name, moment))
        return found


def _in_chunks(model: nn.Module) -> list[str]:
    """The modules of a model that run for one chunk of the sequence at a time."""
    if not isinstance(model, GPT):
        return []
    found = ["output", "loss"] if model.loss_chunks > 1 else []
    for name, module in model.named_modules():
        if isinstance(module, MLP) and module.chunks > 1:
            found += [f"{name}.up", f"{name}.down"]
    return found


def load_recording(folder: Path, rank: int) -> Recording:
    """Read a recording that `LayoutRecorder.save` wrote."""
    tensors = load_file(folder / f"rank{rank}.safetensors")
    cuts, place = json.loads((folder / f"rank{rank}.json").read_text())
    return Recording(
        {Key(*json.loads(key)): tensor for key, tensor in tensors.items()},
        {name: Cut(dim, tuple(parts), tuple(sizes)) for name, (dim, parts, sizes) in cuts.items()},
        {axis: (coordinate, size) for axis, (coordinate, size) in place.items()},
    )
