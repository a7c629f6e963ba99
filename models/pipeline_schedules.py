"""The order of a stage's forward and backward passes, for DeepSpeed's pipeline engine.

All schedules compute the same gradients. They differ in idle time (the bubble) and in how many
micro batches' activations are alive at once. With p stages and m micro batches:

    schedule   idle share of a step       micro batches alive on stage s
    1f1b       (p - 1) / (m + p - 1)      at most p - s         DeepSpeed's TrainSchedule
    zb-h1      (p - 1) / (3 m + p - 1)    at most p - s, and s that wait for W; m >= p
    gpipe      (p - 1) / (m + p - 1)      m                     arXiv:1811.06965
    naive      (p - 1) / p                1
    interleaved, with v model chunks a stage
               (p - 1) / (v m + p - 1)    2 (p - s) - 1 + (v - 1) p passes of one chunk

For p = 3, m = 4 (numbers: forward passes; letters: backward passes, assumed to take as long):

    gpipe  stage 0   1 2 3 4 . . . . A B C D      1f1b   1 2 3 . . A 4 B . C . D
           stage 1   . 1 2 3 4 . . A B C D .             . 1 2 . A 3 B 4 C . D .
           stage 2   . . 1 2 3 4 A B C D . .             . . 1 A 2 B 3 C 4 D . .

zb-h1 splits a backward pass into B (capital), the gradients of inputs, which the stage before waits
for, and W (small), those of weights, for which no stage waits. Each is drawn as long as a forward
pass, so that 1f1b's letters above would be two wide and its step 18 long, not 14:

    zb-h1  stage 0   1 2 3 . . A a 4 B b C c D d
           stage 1   . 1 2 . A 3 B a 4 C b D c d
           stage 2   . . 1 A 2 B 3 C a 4 D b c d

interleaved has passes of one model chunk each. Two stages of two, ' for the second:

    interleaved  stage 0   1 2 1' 2' 3 A' 4 B' 3' A 4' B . C' . D' C D
                 stage 1   . 1 2 1' A' 2' B' 3 A 4 B 3' C' 4' D' C D .
"""

from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    BufferOpInstruction,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    PipeSchedule,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    ReduceTiedGrads,
    SendActivation,
    SendGrad,
    TrainSchedule,
)

from models.pipeline_stages import interleaved_passes

Instructions = list[PipeInstruction]


class KeepLoss(BufferOpInstruction):
    """Save the loss of the last forward pass in a buffer.

    DeepSpeed's engine keeps only the loss of the last forward pass and starts the last stage's
    backward pass from it. That is correct only if each forward pass is immediately followed by its
    backward pass.
    """


class TakeLoss(BufferOpInstruction):
    """Start the next backward pass from the loss in a buffer."""


class WeightPass(PipeInstruction):
    """Compute the weight gradients of the micro batch that has waited longest for them."""


class _InOrder(PipeSchedule):
    """Shared by the two simple schedules: whole forwards, whole backwards, and the step."""

    def _forward(self, buffer: int) -> Instructions:
        todo: Instructions = []
        if not self.is_first_stage:
            todo.append(RecvActivation(buffer))
        if self.is_first_stage or self.is_last_stage:  # tokens at one end, labels at the other
            todo.append(LoadMicroBatch(buffer))
        todo.append(ForwardPass(buffer))
        todo.append(KeepLoss(buffer) if self.is_last_stage else SendActivation(buffer))
        return todo

    def _backward(self, buffer: int) -> Instructions:
        todo: Instructions = [TakeLoss(buffer) if self.is_last_stage else RecvGrad(buffer)]
        todo.append(BackwardPass(buffer))
        if not self.is_first_stage:
            todo.append(SendGrad(buffer))
        return todo

    def _step(self) -> Instructions:
        return [ReduceTiedGrads(), ReduceGrads(), OptimizerStep()]


class GPipeSchedule(_InOrder):
    """All forward passes, then all backward passes (arXiv:1811.06965)."""

    def steps(self) -> Iterator[Instructions]:
        """The instructions of one optimizer step, a micro batch at a time."""
        for buffer in range(self.micro_batches):
            yield self._forward(buffer)
        for buffer in range(self.micro_batches):
            yield self._backward(buffer)
        yield self._step()

    def num_pipe_buffers(self) -> int:
        """Every micro batch's activations are kept until its backward pass."""
        return int(self.micro_batches)


class NaiveSchedule(_InOrder):
    """One micro batch in flight: plain layer-wise model parallelism, one busy stage at a time."""

    def steps(self) -> Iterator[Instructions]:
        """The instructions of one optimizer step, a micro batch at a time."""
        for _ in range(self.micro_batches):
            yield [*self._forward(0), *self._backward(0)]
        yield self._step()

    def num_pipe_buffers(self) -> int:
        """One buffer, reused by every micro batch."""
        return 1


class ZeroBubbleSchedule(TrainSchedule):
    """1F1B with backward passes in two parts: ZB-H1 of arXiv:2401.10241.

    Stage s puts W off by s micro batches. The gradient of the first micro batch so comes back p - 1
    weight passes sooner, and what was put off fills the end, where 1F1B waits. On each stage p micro
    batches have had their forward pass and not W: as many as on 1F1B's first stage.
    """

    def steps(self) -> Iterator[Instructions]:
        """The instructions of one optimizer step: 1F1B's, with weight passes between them."""
        waiting = 0
        for step in super().steps():
            passes = [one for one in step if isinstance(one, BufferOpInstruction)]
            end = step[len(passes) :]  # reductions and the optimizer
            kinds = {type(one) for one in passes}
            if BackwardPass in kinds:
                waiting += 1
            elif waiting > self.stage_id:
                # Messages wait for both sides. Between a backward and a forward pass the stage before is
                # still in its own forward pass: W comes first, and then neither waits for the other.
                # After the last forward pass, the stage before waits for the gradient.
                passes.insert(0 if ForwardPass in kinds else len(passes), WeightPass())
                waiting -= 1
            yield [*passes, *(WeightPass() for _ in range(waiting if end else 0)), *end]


class StartChunk(PipeInstruction):
    """The next passes and messages are those of this model chunk; None: the stage's as a whole."""


class InterleavedSchedule(PipeSchedule):
    """1F1B with several model chunks a stage, through which a micro batch goes in turn.

    The pipeline fills and drains in passes of one chunk, so that a stage idles for 1 / v of 1F1B's
    time, with v chunks (arXiv:2104.04473, section 2.2). Each micro batch travels v times as far.
    """

    def __init__(self, micro_batches: int, stages: int, stage_id: int, model_chunks: int) -> None:
        super().__init__(micro_batches, stages, stage_id)
        self.model_chunks = model_chunks

    def steps(self) -> Iterator[Instructions]:
        """The instructions of one optimizer step, a pass at a time."""
        order = interleaved_passes(
            self.stages, self.stage_id, self.micro_batches, self.model_chunks
        )
        for backward, chunk, micro_batch in order:
            buffer = chunk * self.micro_batches + micro_batch
            yield self._backward(chunk, buffer) if backward else self._forward(chunk, buffer)
        yield [StartChunk(chunk=None), ReduceTiedGrads(), ReduceGrads(), OptimizerStep()]

    def _forward(self, chunk: int, buffer: int) -> Instructions:
        first, last = self._ends(chunk)
        todo: Instructions = [StartChunk(chunk=chunk)]
        if not first:
            todo.append(RecvActivation(buffer))
        if first or last:
            todo.append(LoadMicroBatch(buffer))
        return [*todo, ForwardPass(buffer), KeepLoss(buffer) if last else SendActivation(buffer)]

    def _backward(self, chunk: int, buffer: int) -> Instructions:
        first, last = self._ends(chunk)
        todo: Instructions = [StartChunk(chunk=chunk)]
        todo += [TakeLoss(buffer) if last else RecvGrad(buffer), BackwardPass(buffer)]
        return todo if first else [*todo, SendGrad(buffer)]

    def _ends(self, chunk: int) -> tuple[bool, bool]:
        """Whether a chunk of this stage is the chain's first part, and its last."""
        return (
            self.is_first_stage and chunk == 0,
            self.is_last_stage and chunk == self.model_chunks - 1,
        )

    def num_pipe_buffers(self) -> int:
        """A place for each micro batch in each chunk; it is empty after the backward pass."""
        return int(self.micro_batches) * self.model_chunks


class InterleavedInference(InterleavedSchedule):
    """Forward passes alone, of any number of micro batches."""

    def steps(self) -> Iterator[Instructions]:
        """The instructions of all passes, a pass at a time."""
        for start in range(0, self.micro_batches, self.stages):
            group = min(self.stages, self.micro_batches - start)
            for chunk in range(self.model_chunks):
                for _ in range(group):
                    yield [one for one in self._forward(chunk, 0) if not isinstance(one, KeepLoss)]
        yield [StartChunk(chunk=None)]

    def num_pipe_buffers(self) -> int:
        """One buffer: what was sent is not needed again."""
        return 1


# Those of one model chunk a stage.
SCHEDULES: dict[str, type[PipeSchedule]] = {
    "1f1b": TrainSchedule,
    "zb-h1": ZeroBubbleSchedule,
    "gpipe": GPipeSchedule,
    "naive": NaiveSchedule,
}


def train_schedule(
    name: str, micro_batches: int, stages: int, stage: int, model_chunks: int = 1
) -> PipeSchedule:
    """A stage's schedule of this name, for stages of so many model chunks."""
    if name == "interleaved":
        return InterleavedSchedule(micro_batches, stages, stage, model_chunks)
    return SCHEDULES[name](micro_batches, stages, stage)
