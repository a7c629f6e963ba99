"""The moments of a training step at which memory can peak, each a sum of the tensors that exist then."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from launch.config.layout import Layout
from launch.config.schema import GPTModel, Recipe
from launch.ds_json.view import zero_block, zero_stage
from launch.memory.activations import Activations, activations, compiled, precision
from launch.memory.chunks import Running, bytes_elsewhere
from launch.memory.gathered import Gathered, gathered
from launch.memory.parts import Parts
from launch.memory.shapes import Shape, count, stage_shapes
from launch.memory.state import State, state, wrapper
from models.pipeline_stages import micro_batches_waiting

# Schedules that are DeepSpeed's own, or have its instructions and others.
_BY_DEEPSPEED = ("1f1b", "zb-h1")
# DeepSpeed reduces at most this many gradients at once at stage 0 (a bucket is closed after it).
_REDUCED_AT_ONCE = 500_000_000
# BF16_Optimizer's gradients are sent in pieces, of which two are on their way
# (`deepspeed_patches.speed.bf16_optimizer.reduce_sums_in_pieces`).
PIECE = 64 * 2**20


@dataclass(frozen=True)
class Step:
    """What a rank of one stage holds in a step; `moments` adds it up.

    Attributes:
        shapes: its parameters.
        state, kept, gathered: bytes, by the modules that count them.
        kind: the class that holds its state (`state.wrapper`).
        whole_graph: whether torch.compile sees the whole model.
        checkpointing: whether blocks are computed again in the backward pass.
        product: bytes of an element in matrix products.
        bucket: DeepSpeed's `reduce_bucket_size`, in elements.
        data: data parallel ranks.
        schedule: the pipeline's.
        alive: micro batches whose activations the stage holds at a time; with several model chunks,
            passes of the chunk that runs.
        elsewhere: bytes of the passes of other chunks.
        on_host: bytes of checkpoints in host memory.
        waiting: micro batches that wait for their weight gradients alone.
        buffers: micro batches whose inputs and outputs a pipeline's engine keeps.
        head: elements of the output projection; 0 if another stage has it.
        embedding: elements of the token embedding; 0 if another stage has it.
        tied: whether the head and the embedding are one parameter of this rank.
    """

    shapes: Sequence[Shape]
    state: State
    kept: Activations
    gathered: Gathered
    kind: str
    whole_graph: bool
    checkpointing: bool
    product: int
    bucket: int
    data: int
    schedule: str
    alive: int
    elsewhere: float
    on_host: float
    waiting: int
    buffers: int
    head: int
    embedding: int
    tied: bool

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        layout: Layout,
        ds_config: dict[str, Any],
        stage: int,
        chunks: Sequence[tuple[int, int]],
        running: Running,
    ) -> "Step":
        """A stage that has these chunks of the chain, while one of them runs."""
        assert isinstance(recipe.model, GPTModel)
        config, grid = recipe.model.shape, layout.grid
        shapes = [
            shape
            for first, last in chunks
            for shape in stage_shapes(config, grid["tensor"], first, last)
        ]
        held = state(shapes, ds_config, grid["data"], layout.accumulation)
        of_chunks = [activations(recipe, layout, ds_config, *ends) for ends in chunks]
        chunk, alive_of_chunks = running
        (first, last), kept, alive = chunks[chunk], of_chunks[chunk], alive_of_chunks[chunk]
        # A single rank uses its partition as it is, unless it has to be fetched from the host.
        partitioned = zero_stage(ds_config) == 3 and (grid["data"] > 1 or "weights" in held.host)
        schedule = recipe.parallel.schedule
        has_head, vocab = last == config.layers + 4, -(-config.vocab // grid["tensor"])
        return cls(
            shapes=shapes,
            state=held,
            kept=kept,
            gathered=gathered(config, grid["tensor"], ds_config)
            if partitioned
            else Gathered.none(),
            kind=wrapper(ds_config),
            whole_graph=compiled(recipe, layout, ds_config) == "model",
            checkpointing=recipe.model.checkpoint_activations,
            product=precision(ds_config).product,
            bucket=int(zero_block(ds_config).get("reduce_bucket_size", 500_000_000)),
            data=grid["data"],
            schedule=schedule,
            alive=alive,
            elsewhere=bytes_elsewhere(of_chunks, running),
            on_host=sum(
                number * each.on_host
                for number, each in zip(alive_of_chunks, of_chunks, strict=True)
            ),
            waiting=micro_batches_waiting(schedule, grid["pipeline"], stage, layout.accumulation),
            # DeepSpeed's own schedule has two buffers at least.
            buffers=max(2, alive) if schedule in _BY_DEEPSPEED else alive,
            head=vocab * config.hidden if has_head else 0,
            embedding=vocab * config.hidden if first == 0 else 0,
            tied=config.tied and first == 0 and has_head,
        )

    def moments(self) -> dict[str, Parts]:
        """The parts at each moment of a step at which memory can peak."""
        if self.schedule == "zb-h1" and self.kind == "bf16":
            # Gradients in bf16 come and go in a weight pass (`deepspeed_patches.pipeline`).
            return self._moments(self.alive, self.state.always, self.buffers)
        if self.schedule == "interleaved":
            return self._moments(self.alive, self.state.carried, 1)
        if self.schedule != "gpipe":
            return self._moments(self.alive, self.state.carried, self.buffers)
        # All forward passes come first. No gradient is there when most activations are.
        first = self._moments(self.alive, self.state.always, 1)
        second = self._moments(self.alive - 1, self.state.carried, 2)
        return {
            name: max(first[name], second[name], key=lambda parts: parts.total) for name in first
        }

    def _moments(self, alive: int, before: float, returned: int) -> dict[str, Parts]:
        """The moments with `alive` micro batches' activations, and `before` bytes of gradients.

        `returned` of the inputs that came from the stage before have a gradient.
        """
        kept = self.kept
        micro = alive * kept.kept + kept.casts + kept.received * (self.buffers + returned)
        micro += self.waiting * kept.waiting + self.elsewhere
        logits = alive * kept.logits
        outputs = kept.sent * self.buffers
        # DeepSpeed's own schedule keeps the logits until others take their place, ours until their backward
        # pass (`deepspeed_patches.pipeline.use_schedule`).
        done = kept.sent if self.head and self.schedule not in _BY_DEEPSPEED else 0
        if self.head:
            logits += outputs
        else:
            micro += outputs
        waiting = self.state.waiting
        # The output projection's gradient; of zb-h1, it comes in a weight pass.
        own = 0 if self.schedule == "zb-h1" else self.product * self.head
        found = {
            "the end of the forward pass": self._parts(
                before,
                micro + kept.casts_forward,
                logits + kept.loss_forward,
                waiting,
                self.gathered.forward,
            ),
            "the loss's backward pass": self._parts(
                before + (own if self.whole_graph or kept.chunk else 0),
                micro,
                logits - done + kept.loss_backward,
                waiting,
                self.gathered.loss,
            ),
            "the reduction of gradients": self._parts(
                max(self.state.gradients, self.state.carried + self.state.reduced)
                + self._unreduced(),
                0,
                0,
                self._reduction(),
                self.gathered.end,
            ),
            "the update": self._parts(self.state.gradients, 0, 0, self._update(), 0),
        }
        if self.head and kept.sent:
            # The gradient of the logits is there, and the stage's own input gets one too.
            found["the output projection's backward pass"] = self._parts(
                before + own,
                micro + kept.received,
                logits - kept.logits - done + kept.sent,
                waiting,
                0,
            )
        if kept.chunk:
            # Its weight's gradient from one chunk is added to that from those before.
            found["the output projection's backward pass"] = self._parts(
                before + 2 * own, micro, kept.chunk, waiting, self.gathered.loss
            )
        if self.kind == "bf16":
            # A pipeline's other micro batches are there while the last gradient is added.
            others = micro - kept.kept
            found["the addition of gradients"] = self._parts(
                self.state.gradients + 2.0 * max(shape.numel for shape in self.shapes),
                others,
                logits - kept.logits - done,
                0,
                0,
            )
        if self.whole_graph:
            # The embedding's gradient is added up in fp32; the compiler keeps what was the logits'.
            found["the embedding's backward pass"] = self._parts(
                before + self.product * count(self.shapes) + 4.0 * self.embedding,
                0,
                logits,
                0,
                0,
            )
            if self.checkpointing:
                found["a block's backward pass"] = self._parts(
                    before + own, micro + kept.block_backward, logits, 0, 0
                )
        else:
            # A tied weight's gradient waits for the embedding's; another is added to those before it.
            waits = self.tied or before == self.state.always
            first = self._parts(
                before + (own if waits else 0),
                micro + kept.block_backward + max(0.0, kept.waiting - kept.kept),
                logits - done - kept.logits,
                self.state.backward + self._head_reduction(),
                self.gathered.blocks,
            )
            found["a block's backward pass"] = first
            if self.state.reduced_early:
                # The blocks whose gradients fill the first bucket have let their activations go.
                found["a block's backward pass after the first reduction"] = replace(
                    first,
                    gradients=first.gradients + self.state.reduced_early,
                    activations=first.activations - self._share_in_a_bucket() * kept.kept,
                )
        return found

    def _parts(
        self, gradients: float, activations: float, logits: float, buckets: float, weights: float
    ) -> Parts:
        return Parts(
            weights=self.state.weights,
            gradients=gradients,
            optimizer=self.state.optimizer,
            activations=activations,
            logits=logits,
            buckets=self.state.buckets + buckets,
            gathered=self.product * weights,
        )

    def _unreduced(self) -> float:
        """Gradients that a compiled backward pass returns all at once, before they are added up."""
        return 2.0 * count(self.shapes) if self.whole_graph and self.kind == "zero12" else 0.0

    def _share_in_a_bucket(self) -> float:
        """The share of the blocks' gradients that DeepSpeed reduces first. An untied head comes before."""
        in_blocks = count(self.shapes) - self.embedding
        return min(1.0, self.bucket / in_blocks) if self.tied else 0.0

    def _head_reduction(self) -> float:
        """ZeRO-2's copies of the head's gradient, which is reduced while activations are kept."""
        if self.kind != "zero12" or self.tied or self.head <= self.bucket:
            return 0.0
        return self.product * self.head

    def _reduction(self) -> float:
        """Copies that exist while gradients are reduced at the end of a backward pass."""
        sizes = [shape.numel for shape in self.shapes]
        largest = max(sizes)
        if self.kind == "bf16":
            return 2.0 * min(sum(sizes), 2 * PIECE) if self.data > 1 else 0.0
        if self.kind in ("torch", "unfused"):
            size = 4.0 if self.kind == "torch" else 2.0
            return size * min(sum(sizes), _REDUCED_AT_ONCE + largest)
        if self.kind == "zero12":
            # A full bucket is copied to be reduced.
            flat = 0.0 if largest > self.bucket else self.product * min(self.bucket, sum(sizes))
            return self.state.backward + flat
        return 2.0 * largest

    def _update(self) -> float:
        """Temporary copies during the update."""
        return float(self.state.update)
