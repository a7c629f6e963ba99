"""The GPT as a chain of layers for DeepSpeed's PipelineModule, cut into stages.

    token embedding | position | block 0 | ... | block L-1 | norm | output projection

Each layer maps one tensor to one: token ids, then the residual stream, then logits. A stage runs a
run of them and sends what comes out to the next one; on the way back, the gradient of what it was
sent. Inside a stage the layers are those of `models/gpt.py`, cut over tensor ranks or not.

A tied output projection is the token embedding again. Where the two lie on different stages, each has
a copy, and DeepSpeed adds up the copies' gradients before the step (`TiedLayerSpec`).
"""

from collections.abc import Iterator
from functools import partial

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.config import GPTConfig
from models.gpt import Block, Output, Position, norm_class, rotary_table
from models.parallel.cross_entropy import vocab_parallel_cross_entropy
from models.parallel.grid import Grid
from models.parallel.tensor_parallel import VocabParallelEmbedding, column_parallel
from models.parallel.topology import TensorParallel
from models.pipeline_stages import stage_bounds

_TIED_KEY = "token"


class PipelineBlock(Block):
    """A block that makes its own rotary table: a stage is sent one tensor, and that is `x`."""

    def __init__(self, config: GPTConfig, tp: TensorParallel, checkpoint_activations: bool) -> None:
        super().__init__(config, tp)
        self.config, self.tp = config, tp
        self.checkpoint_activations = checkpoint_activations

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """As `Block.forward`; without a table, it makes the one that the config's positions need."""
        if table is None and self.config.position == "rope":
            cut = self.tp.size if self.tp.sequence_parallel else 1
            table = rotary_table(self.config, x.shape[1] * cut, x.device)
        if self.checkpoint_activations and self.training:
            kept: Tensor = checkpoint(super().forward, x, table, use_reentrant=False)
            return kept
        return super().forward(x, table)


def tied_projection(
    embedding: VocabParallelEmbedding, x: Tensor, *, sequence_parallel: bool
) -> Tensor:
    """Logits from the token embedding's own weight.

    `[batch, sequence, hidden]` (sequence / ranks with sequence parallelism) to
    `[batch, sequence, ceil(vocab / ranks)]`.
    """
    return column_parallel(x, embedding.weight, None, embedding.group, sequence_parallel)


def layer_specs(
    config: GPTConfig, tp: TensorParallel, checkpoint_activations: bool
) -> list[LayerSpec]:
    """The chain of layers, none of them built yet: a stage builds only its own."""
    embedding = (VocabParallelEmbedding, config.vocab, config.hidden, tp.group)
    first, last = LayerSpec(*embedding), LayerSpec(Output, config, tp)
    if config.tied:
        project = partial(tied_projection, sequence_parallel=tp.sequence_parallel)
        first = TiedLayerSpec(_TIED_KEY, *embedding)
        last = TiedLayerSpec(_TIED_KEY, *embedding, forward_fn=project)
    return [
        first,
        LayerSpec(Position, config, tp),
        *(
            LayerSpec(PipelineBlock, config, tp, checkpoint_activations)
            for _ in range(config.layers)
        ),
        LayerSpec(norm_class(config), config.hidden, config.norm_eps, tp.sequence_group),
        last,
    ]


class GPTPipeline(PipelineModule):
    """This rank's stage of a GPT. DeepSpeed's engine runs it, in the order of `pipeline_schedules.py`.

    Parameters are uninitialised; `canonical_parameters` names them as the model on one device does.

    Raises:
        ValueError: as `stage_bounds`.
    """

    def __init__(
        self,
        config: GPTConfig,
        grid: Grid,
        tp: TensorParallel,
        partition: str = "parameters",
        checkpoint_activations: bool = False,
    ) -> None:
        # Before nn.Module.__init__ plain values only: PipelineModule cuts and builds in its own.
        self.bounds = stage_bounds(config, grid["pipeline"], partition)
        self.config, self.tp_group = config, tp.group
        super().__init__(
            layers=layer_specs(config, tp, checkpoint_activations),
            topology=PipeModelDataParallelTopology(
                num_pp=grid["pipeline"], num_mp=grid["tensor"], num_dp=grid["data"]
            ),
            loss_fn=self.loss,
        )

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of a micro batch, the same scalar on every tensor rank.

        Logits `[batch, sequence, ceil(vocab / ranks)]`, labels `[batch, sequence]`.
        """
        return vocab_parallel_cross_entropy(logits, labels, self.config.vocab, self.tp_group)

    def _partition_layers(self, method: str = "") -> None:
        # DeepSpeed's own would build every layer of the model on every rank to count its parameters.
        self.parts = self.bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def canonical_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This stage's parameters by their names on one device, tied copies as the embedding.

        As this rank holds them: cut ones with `parameter.shard`.
        """
        prefixes = ["embedding.token", "embedding.position"]
        prefixes += [f"blocks.{i}" for i in range(self.config.layers)] + ["norm", "output"]
        for name, parameter in self.named_parameters():
            layer, _, rest = name.removeprefix("tied_modules.").partition(".")
            prefix = prefixes[0] if layer == _TIED_KEY else prefixes[int(layer)]
            yield f"{prefix}.{rest}", parameter
