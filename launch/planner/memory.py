"""Estimate a rank's memory for a layout, before anything is started.

The estimate covers the tensors below, but not NCCL, the CUDA context, DeepSpeed's communication
buckets, ZeRO-3's gathered weights, or fragmentation in the allocator. It assumes no
`torch.compile`, which keeps fewer activations. Leave a tenth of the GPU free, and measure.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from launch.config.layout import Layout
from launch.config.schema import GPTModel, Recipe
from launch.ds_json.view import accumulation_dtype, is_enabled, offload_device, zero_stage
from models.config import GPTConfig, parameters_by_layer
from models.pipeline_stages import micro_batches_alive

_GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Memory of the fullest rank, in GiB; `host` is the part offloaded to its host or a disk.

    `stage` is that rank's pipeline stage; `parameters` counts its shard before ZeRO partitions it.
    """

    stage: int
    parameters: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    host: float

    @property
    def total(self) -> float:
        """GiB on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def describe(self) -> str:
        """One readable line: the sum and its parts."""
        line = (
            f"memory per rank (estimate): {self.total:.3g} GiB = weights {self.weights:.3g} "
            f"+ gradients {self.gradients:.3g} + optimizer {self.optimizer:.3g} "
            f"+ activations {self.activations:.3g}; fullest is stage {self.stage}, with "
            f"{self.parameters:,} parameters"
        )
        return line + (f"; offloaded {self.host:.3g} GiB" if self.host else "")


def estimate(recipe: Recipe, layout: Layout, ds_config: dict[str, Any]) -> Memory:
    """The memory of the fullest rank, for a resolved DeepSpeed JSON and a model of family gpt.

    Raises:
        ValueError: if the layers cannot be split into stages as `parallel.partition` says.
    """
    assert isinstance(recipe.model, GPTModel)
    config = recipe.model.shape
    bounds = [0, config.layers + 4]
    if layout.grid["pipeline"] > 1:
        from models.pipeline_stages import stage_bounds

        bounds = stage_bounds(config, layout.grid["pipeline"], recipe.parallel.partition)
    stages = []
    for stage, (first, last) in enumerate(pairwise(bounds)):
        parameters = stage_parameters(config, layout.grid["tensor"], first, last)
        device, host = _state_bytes(ds_config, layout.grid["data"])
        activations = _activation_bytes(recipe, layout, _element(ds_config), stage, first, last)
        stages.append(
            Memory(
                stage=stage,
                parameters=parameters,
                weights=device[0] * parameters / _GIB,
                gradients=device[1] * parameters / _GIB,
                optimizer=device[2] * parameters / _GIB,
                activations=activations / _GIB,
                host=sum(host) * parameters / _GIB,
            )
        )
    return max(stages, key=lambda memory: memory.total)


def stage_parameters(config: GPTConfig, tensor: int, first: int, last: int) -> int:
    """Parameters on each tensor rank of a stage that runs layers first to last - 1 of the chain.

    Matrices and the biases of column-parallel layers are sharded over the tensor ranks; norms,
    positions and the biases of row-parallel layers are whole on each rank. The vocabulary is padded
    to a multiple of the ranks. An output tied to an embedding on the same stage counts once.
    """
    c = config
    norm = c.hidden * (2 if c.norm == "layernorm" else 1)
    whole_in_block = 2 * norm + (2 * c.hidden if c.bias else 0)
    whole_in_block += 2 * c.head_dim if c.qk_norm else 0
    total = 0
    for name, size in parameters_by_layer(config)[first:last]:
        if name in ("token", "output"):
            total += -(-c.vocab // tensor) * c.hidden
        elif name == "block":
            total += (size - whole_in_block) // tensor + whole_in_block
        else:
            total += size
    if c.tied and first == 0 and last == c.layers + 4:
        total -= -(-c.vocab // tensor) * c.hidden
    return total


def _element(ds_config: dict[str, Any]) -> int:
    """Bytes per element in the forward pass."""
    low = any(is_enabled(ds_config, name) for name in ("bf16", "fp16", "torch_autocast"))
    return 2 if low else 4


def _state_bytes(ds_config: dict[str, Any], data: int) -> tuple[list[float], list[float]]:
    """Bytes per parameter for weights, gradients and optimizer: on the device, and offloaded.

    `data` is the data parallel size, over which ZeRO partitions (arXiv:1910.02054, section 5). The
    optimizer state is AdamW's two moments, plus fp32 weights wherever DeepSpeed keeps its own copy:
    at stage 0 unless the model is fp32, at stages 1 to 3 always.
    """
    bf16 = is_enabled(ds_config, "bf16")
    low = bf16 or is_enabled(ds_config, "fp16")
    accumulate, stage = accumulation_dtype(ds_config), zero_stage(ds_config)
    weights = 2.0 if low else 4.0
    gradients = 4.0 if accumulate == "fp32" else weights
    if stage == 0:
        return [weights, weights, 12.0 if low else 8.0], [0.0]
    optimizer = 12.0 / data
    if stage == 1 and bf16 and accumulate == "fp32":
        # BF16_Optimizer keeps a backward pass's gradients whole and accumulates them at its end.
        gradients += 2.0
    if stage >= 2:
        gradients /= data
    if stage == 3:
        weights /= data
    device = [weights, gradients, optimizer]
    host = [0.0, 0.0, 0.0]
    if offload_device(ds_config, "offload_optimizer") != "none":
        host[1:], device[1:] = device[1:], [0.0, 0.0]
    if stage == 3 and offload_device(ds_config, "offload_param") != "none":
        host[0], device[0] = device[0], 0.0
    return device, host


def block_bytes(config: GPTConfig, tensor: int, sequence_parallel: bool, element: int) -> float:
    """Bytes per token that a block keeps for its backward pass, on one tensor rank.

    Counts the tensors of arXiv:2205.05198, section 4, except attention's scores, which fused
    attention does not keep, and dropout masks if there is no dropout. For a GPT in 16 bits, that is
    h * (34 - 2) on one rank and h * (8 + 24 / t) on t ranks. With sequence parallelism, the paper
    has h * 32 / t; here it is h * (4 + 28 / t), because the inputs of column-parallel layers are
    kept gathered. RMSNorm is assumed to be torch's fused kernel, as on a GPU; on a CPU it keeps
    fp32 copies.
    """
    c = config
    residual = c.hidden / tensor if sequence_parallel else c.hidden
    query = c.heads * c.head_dim / tensor
    key_value = max(c.kv_heads / tensor, 1.0) * c.head_dim
    numbers = 2 * residual  # inputs of the two norms
    numbers += 2 * c.hidden  # inputs of the qkv projection and of the MLP
    numbers += query + 2 * key_value  # inputs of attention
    if c.qk_norm or (c.position == "rope" and tensor <= c.kv_heads):
        numbers += query + key_value  # before rotation: one tensor with the values
    numbers += query  # output of attention
    numbers += c.ffn / tensor * (4 if c.mlp == "swiglu" else 2)  # in the MLP
    masks = 2 * residual if c.dropout else 0.0
    return element * numbers + masks


def _activation_bytes(
    recipe: Recipe, layout: Layout, element: int, stage: int, first: int, last: int
) -> float:
    """A stage's peak: the activations kept for its micro batches, plus working memory for one.

    Kept: the blocks' activations, or with recomputation one hidden vector per block; the tensors
    that the stage sends; on the last stage, the inputs of the norm and the projection, and the
    log-probabilities in fp32 (4 bytes per logit; the pipeline engine also holds the logits).
    Working memory is the larger of
    - the loss: 8 bytes per logit for its gradient and that of the log-probabilities, plus, with
      tensor parallelism, the logits' own bytes;
    - the backward pass of a block: half of what the block keeps, for the gradients in flight, plus,
      with recomputation, all of what it keeps.
    """
    assert isinstance(recipe.model, GPTModel)
    c, tensor = recipe.model.shape, layout.grid["tensor"]
    sequence_parallel = recipe.parallel.sequence
    residual = element * (c.hidden / tensor if sequence_parallel else c.hidden)
    block = block_bytes(c, tensor, sequence_parallel, element)
    again = recipe.model.checkpoint_activations
    blocks = [name for name, _ in parameters_by_layer(c)][first:last].count("block")
    kept = blocks * (residual if again else block)
    work = (1.5 if again else 0.5) * block
    if last == c.layers + 4:
        logits = -(-c.vocab // tensor)
        kept += residual + element * c.hidden
        kept += logits * (4 + (element if layout.grid["pipeline"] > 1 else 0))
        work = max(work, logits * (8 + (element if tensor > 1 else 0)))
    else:
        kept += element * c.hidden / tensor
    alive = micro_batches_alive(
        recipe.parallel.schedule, layout.grid["pipeline"], stage, layout.accumulation
    )
    tokens = layout.micro_batch * recipe.data.sequence_length
    return tokens * (alive * kept + work)
