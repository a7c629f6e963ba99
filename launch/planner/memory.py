"""How much memory a rank of a layout needs, worked out before anything is started.

An estimate: what the tensors below take, and not NCCL, the CUDA context, DeepSpeed's communication
buckets, ZeRO-3's gathered weights, or what the allocator loses to fragmentation. Without
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
    """What the fullest rank holds, in GiB; `host` is what is offloaded to its host or a disk.

    `stage` is that rank's pipeline stage, and `parameters` those of its shard before ZeRO divides it.
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
        """One line for a person: the sum and its parts."""
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
        ValueError: where the layers cannot be cut as `parallel.partition` says.
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

    Matrices, and the biases of column-parallel layers, are sharded over the tensor ranks; norms, the
    biases of row-parallel layers and positions are whole on each; the vocabulary is padded to a
    multiple of the ranks. An output tied to an embedding on the same stage is counted once.
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
    """Bytes of a number in the forward pass."""
    low = any(is_enabled(ds_config, name) for name in ("bf16", "fp16", "torch_autocast"))
    return 2 if low else 4


def _state_bytes(ds_config: dict[str, Any], data: int) -> tuple[list[float], list[float]]:
    """Bytes a parameter for weights, gradients and optimizer: on the device, and offloaded.

    `data` is the data parallel size, over which ZeRO divides (arXiv:1910.02054, section 5). The
    optimizer is AdamW's two moments, and fp32 weights wherever DeepSpeed keeps a copy of its own: at
    stage 0 not in fp32, at stages 1 to 3 always.
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
        # BF16_Optimizer keeps those of a backward pass whole, and adds them up at its end.
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
    """Bytes a token that a block keeps for its backward pass, on one tensor rank.

    The tensors of arXiv:2205.05198, section 4, but for attention's scores, which fused attention does
    not keep, and for dropout's masks where there is no dropout. For a GPT in 16 bits that is
    h * (34 - 2) on one rank, and h * (8 + 24 / t) on t. With sequence parallelism the paper has
    h * 32 / t; here h * (4 + 28 / t), as the inputs of column-parallel layers are kept gathered.
    RMSNorm is taken to be torch's fused one, as on a GPU; on a CPU it keeps fp32 copies.
    """
    c = config
    residual = c.hidden / tensor if sequence_parallel else c.hidden
    query = c.heads * c.head_dim / tensor
    key_value = max(c.kv_heads / tensor, 1.0) * c.head_dim
    numbers = 2 * residual  # what goes into the two norms
    numbers += 2 * c.hidden  # into queries, keys, values, and into the MLP
    numbers += query + 2 * key_value  # into attention
    if c.qk_norm or (c.position == "rope" and tensor <= c.kv_heads):
        numbers += query + key_value  # before they are turned: one tensor with the values
    numbers += query  # out of attention
    numbers += c.ffn / tensor * (4 if c.mlp == "swiglu" else 2)  # in the MLP
    masks = 2 * residual if c.dropout else 0.0
    return element * numbers + masks


def _activation_bytes(
    recipe: Recipe, layout: Layout, element: int, stage: int, first: int, last: int
) -> float:
    """The peak of a stage: what its micro batches keep, and the work on one of them.

    Kept: the blocks, or with recomputation a hidden vector a block; what a stage sends; on the last
    stage what goes into the norm and the projection, and the log-probabilities in fp32 (4 bytes a
    logit; the pipeline engine holds the logits too). At work, the larger of
    - the loss: 8 bytes per logit for its gradient and that of the log-probabilities, and over tensor
      ranks the logits' own;
    - the backward pass of a block: half of what it keeps, once again for the gradients on their way,
      and with recomputation all of it before.
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
