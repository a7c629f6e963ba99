"""The GPT as a chain of layers for DeepSpeed's PipelineModule, split into stages.

    token embedding | position | block 0 | ... | block L-1 | norm | output projection

Each layer maps one tensor to one tensor: token ids, then the residual stream, then logits. A stage
runs consecutive layers and sends its output to the next stage; in the backward pass, it sends the
gradient of its input to the previous stage. Inside a stage, the layers are those of
`models/gpt.py`, sharded over tensor ranks or not. If rows hold several documents, the positions
travel with the residual stream, because attention on every stage needs them.

A tied output projection reuses the token embedding. If the two are on different stages, each stage
has a copy, and DeepSpeed sums the copies' gradients before the step (`TiedLayerSpec`).

With several model chunks a stage (the interleaved schedule), the chain has as many parts for each
stage, and part n is chunk n // stages of stage n % stages: a micro batch goes round the stages once
for each chunk.
"""

from collections.abc import Iterator

import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from models.attention import attention_inputs
from models.config import GPTConfig
from models.gpt import Block, Loss, Output, Position, run_block
from models.norms import norm_class
from models.parallel.grid import Grid
from models.parallel.tensor_parallel import (
    ColumnParallelLinear,
    Product,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel,
)
from models.parallel.topology import TensorParallel
from models.parallel.weight_gradients import WeightGradients
from models.pipeline_stages import stage_chunks

_TIED_KEY = "token"
TIED_PARAMETER = "embedding.token.weight"  # its name in the whole model


class TiedEmbedding(VocabParallelEmbedding):
    """The token embedding of a model whose output projection has the same weight."""

    def __init__(self, config: GPTConfig, tp: TensorParallel) -> None:
        super().__init__(config.vocab, config.hidden, tp.group)
        self.sequence_parallel = tp.sequence_parallel
        self.product: Product = F.linear

    def project(self, x: Tensor) -> Tensor:
        """Logits.

        `[batch, sequence, hidden]` (sequence / ranks with sequence parallelism) to
        `[batch, sequence, ceil(vocab / ranks)]`.
        """
        return column_parallel(
            x, self.weight, None, self.group, self.sequence_parallel, self.product
        )


def layer_specs(config: GPTConfig, tp: TensorParallel) -> list[LayerSpec]:
    """The chain of layers, not built yet: a stage builds only its own."""
    first = LayerSpec(VocabParallelEmbedding, config.vocab, config.hidden, tp.group)
    last = LayerSpec(Output, config, tp)
    if config.tied:
        embedding = (_TIED_KEY, TiedEmbedding, config, tp)
        first = TiedLayerSpec(*embedding)
        last = TiedLayerSpec(*embedding, forward_fn=TiedEmbedding.project)
    return [
        first,
        LayerSpec(Position, config, tp),
        *(LayerSpec(Block, config, tp) for _ in range(config.layers)),
        LayerSpec(norm_class(config), config.hidden, config.norm_eps, tp.sequence_group),
        last,
    ]


class GPTPipeline(PipelineModule):
    """This rank's stage of a GPT, run by DeepSpeed's engine.

    The order of passes is in `pipeline_schedules.py`. Parameters are uninitialised;
    `canonical_parameters` gives them their single-device names.

    Attributes:
        model_chunks: how many parts of the chain each stage has.
        chunk: the one that runs, from 0; None: the stage as a whole.

    Raises:
        ValueError: as `stage_chunks`.
    """

    def __init__(
        self,
        config: GPTConfig,
        grid: Grid,
        tp: TensorParallel,
        partition: str = "parameters",
        checkpoint_activations: bool = False,
        cpu_checkpointing: bool = False,
        model_chunks: int = 1,
    ) -> None:
        # Only plain values before nn.Module.__init__; PipelineModule's own partitions and builds.
        self.model_chunks = model_chunks
        self.chunks_of_stages = stage_chunks(config, grid["pipeline"], partition, model_chunks)
        self.chunk: int | None = None
        self.config, self.tp = config, tp
        self.checkpoint_activations = checkpoint_activations
        self.cpu_checkpointing = cpu_checkpointing
        super().__init__(
            layers=layer_specs(config, tp),
            topology=PipeModelDataParallelTopology(
                num_pp=grid["pipeline"], num_mp=grid["tensor"], num_dp=grid["data"]
            ),
            loss_fn=self.loss,
        )
        self.summed_loss = Loss(config, tp)

    def at_start(self) -> bool:
        """Whether what runs begins with the token embedding."""
        return self.stage_id == 0 and not self.chunk

    def at_end(self) -> bool:
        """Whether what runs ends with the logits."""
        last = self.model_chunks - 1
        return self.stage_id == self.num_stages - 1 and self.chunk in (None, last)

    def forward(self, sent: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Run this stage's layers, or those of `chunk`; replaces DeepSpeed's own loop over them.

        The input is token ids `[batch, sequence]` or the residual stream
        `[batch, sequence, hidden]` (sequence / ranks with sequence parallelism), plus positions
        `[batch, sequence]` if rows hold several documents. The stage passes both on; the chain's end
        returns logits `[batch, sequence, ceil(vocab / ranks)]`.
        """
        x, positions = sent if isinstance(sent, tuple) else (sent, None)
        shards = self.tp.size if self.tp.sequence_parallel and not self.at_start() else 1
        inputs = attention_inputs(self.config, x.shape[1] * shards, positions, x.device)
        recompute = self.checkpoint_activations and self.training
        for layer in self.forward_funcs[self._spans[self.chunk or 0]]:
            if isinstance(layer, Block):
                x = run_block(layer, x, inputs, recompute, self.cpu_checkpointing)
            elif isinstance(layer, Position):
                x = layer(x, positions)
            else:
                x = layer(x)
        if positions is None or self.at_end():
            return x
        return x, positions

    def split_backward(self, later: WeightGradients | None) -> None:
        """Have the linear layers leave their weight gradients to `later`; None: compute them at once."""
        self.later = later
        for module in self.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear | TiedEmbedding):
                module.product = F.linear if later is None else later.linear

    def loss(self, logits: Tensor, target: tuple[Tensor, ...]) -> Tensor:
        """A micro batch's contribution to the loss, the same scalar on every tensor rank.

        Logits are `[batch, sequence, ceil(vocab / ranks)]`. The target holds the labels
        `[batch, sequence]`, the denominator of the summed loss and, if labels have unequal weights,
        those weights `[batch, sequence]`.
        """
        labels, denominator, *weights = target
        total: Tensor = self.summed_loss(logits, labels, weights[0] if weights else None)
        return total / denominator

    def stage_owner(self, layer_idx: int) -> int:
        """The stage that runs a layer of the chain."""
        return next(
            stage
            for stage, chunks in enumerate(self.chunks_of_stages)
            if any(first <= layer_idx < last for first, last in chunks)
        )

    def _partition_layers(self, method: str = "") -> None:
        # DeepSpeed's version builds every layer of the model on every rank to count its parameters.
        chunks = self.chunks_of_stages[self.stage_id]
        self._set_bounds(start=chunks[0][0], stop=chunks[-1][1])

    def _build(self) -> None:
        # DeepSpeed's version builds one range of layers; each chunk is one.
        self._spans: list[slice] = []
        whole = self._local_start, self._local_stop
        for first, last in self.chunks_of_stages[self.stage_id]:
            built = len(self.forward_funcs)
            self._set_bounds(start=first, stop=last)
            super()._build()
            self._spans.append(slice(built, len(self.forward_funcs)))
        self._set_bounds(*whole)

    def canonical_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This stage's parameters by their single-device names.

        A tied copy has the embedding's name. Parameters are as this rank holds them: sharded ones
        carry `parameter.shard`.
        """
        for name, parameter in self.named_parameters():
            yield self.canonical_name(name), parameter

    def canonical_name(self, name: str) -> str:
        """The single-device name of one of this stage's layers, or of what is in it."""
        if name == "summed_loss":
            return "loss"
        prefixes = ["embedding.token", "embedding.position"]
        prefixes += [f"blocks.{i}" for i in range(self.config.layers)] + ["norm", "output"]
        layer, dot, rest = name.removeprefix("tied_modules.").partition(".")
        prefix = prefixes[0] if layer == _TIED_KEY else prefixes[int(layer)]
        return f"{prefix}{dot}{rest}"
