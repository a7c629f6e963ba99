"""Bytes of activations on a rank: what blocks and the loss keep, and what a backward pass needs beside it.

The terms were found with torch 2.11 on GPUs (fused attention and norms) and are tested against them in
`tests/recipes/test_gpu_memory.py`; `tests/recipes/test_memory.py` compares a block's with autograd's own.
"""

from dataclasses import dataclass
from typing import Any, Literal

from launch.config.layout import Layout, compiled_as_whole
from launch.config.schema import GPTModel, Recipe
from launch.ds_json.view import is_enabled, zero_stage
from launch.memory.shapes import stage_shapes
from models.config import GPTConfig

Compiled = Literal["no", "blocks", "model"]
_STATISTIC = 4  # bytes of a number that a norm or attention keeps for a token


@dataclass(frozen=True)
class Precision:
    """Bytes of an element: in matrix products, and in the residual stream and the norms.

    They differ under torch_autocast alone, where weights are in fp32 and cast to 16 bits for use.
    """

    product: int
    stream: int

    @property
    def casts(self) -> bool:
        """Whether weights are cast in each forward pass."""
        return self.product < self.stream


def precision(ds_config: dict[str, Any]) -> Precision:
    """The precision of a resolved DeepSpeed JSON."""
    if is_enabled(ds_config, "bf16") or is_enabled(ds_config, "fp16"):
        return Precision(2, 2)
    return Precision(2, 4) if is_enabled(ds_config, "torch_autocast") else Precision(4, 4)


def compiled(recipe: Recipe, layout: Layout, ds_config: dict[str, Any]) -> Compiled:
    """What torch.compile sees as one graph: `launch/training/compile.py`."""
    if not recipe.train.compile:
        return "no"
    on_cpu = isinstance(recipe.model, GPTModel) and recipe.model.cpu_checkpointing
    return "model" if compiled_as_whole(layout.grid, zero_stage(ds_config), on_cpu) else "blocks"


def block_bytes(
    config: GPTConfig,
    tensor: int,
    sequence_parallel: bool,
    element: Precision,
    compiled: bool = False,
) -> float:
    """Bytes per token that a block keeps for its backward pass, on one tensor rank.

    Counts the tensors of arXiv:2205.05198, section 4, except attention's scores, which fused
    attention does not keep, and dropout masks if there is no dropout. For a GPT in 16 bits, that is
    h * (34 - 2) on one rank and h * (8 + 24 / t) on t ranks. With sequence parallelism, the paper
    has h * 32 / t; here it is h * (4 + 28 / t), because the inputs of column-parallel layers are
    kept gathered. RMSNorm is assumed to be torch's fused kernel, as on a GPU; on a CPU it keeps
    fp32 copies. Statistics of norms and attention (4 bytes a token and norm or head) are left out.

    A compiled block keeps as much, but for SwiGLU, of which one product is computed again.
    """
    c = config
    residual = c.hidden / tensor if sequence_parallel else c.hidden
    query = c.heads * c.head_dim / tensor
    key_value = max(c.kv_heads / tensor, 1.0) * c.head_dim
    stream = 2 * residual  # inputs of the two norms
    numbers: float = 2 * c.hidden  # inputs of the qkv projection and of the MLP
    numbers += query + 2 * key_value  # inputs of attention
    if c.qk_norm or (c.position == "rope" and tensor <= c.kv_heads):
        numbers += query + key_value  # before rotation: one tensor with the values
    numbers += query  # output of attention
    if c.qk_norm:
        numbers += query  # the same, transposed: a norm leaves heads before tokens in memory
    found = element.product * numbers + element.stream * stream
    found += mlp_bytes(config, tensor, element, compiled)
    if c.qk_norm and element.casts and not compiled:
        found += 2 * element.stream * (query + key_value)  # the norms' inputs and results, in fp32
    return found + (2 * residual if c.dropout else 0.0)


def mlp_bytes(config: GPTConfig, tensor: int, element: Precision, compiled: bool = False) -> float:
    """Those of `block_bytes` that are `ffn` wide: what `mlp_chunks` divides."""
    gated = 3 if compiled else 4
    return element.product * config.ffn / tensor * (gated if config.mlp == "swiglu" else 2)


def waiting_bytes(config: GPTConfig, tensor: int, element: Precision) -> float:
    """Bytes per token with which a block waits for its weight gradients, on one tensor rank.

    Inputs of its four linear layers and gradients of their outputs: `models/parallel/weight_gradients.py`.
    A GPT on one rank has h * 32 in 16 bits: as much as it keeps for its backward pass.
    """
    c = config
    query, key_value = c.heads * c.head_dim / tensor, c.kv_heads * c.head_dim / tensor
    up = c.ffn / tensor * (2 if c.mlp == "swiglu" else 1)
    inputs = 2 * c.hidden + query + c.ffn / tensor
    gradients = query + 2 * key_value + up + 2 * c.hidden
    return element.product * (inputs + gradients)


def _statistics(config: GPTConfig, tensor: int) -> float:
    """Bytes per token of a block's statistics: a number for each head of attention, and of each norm."""
    c = config
    norm = 2 if c.norm == "layernorm" else 1
    heads = (c.heads + (c.heads + c.kv_heads if c.qk_norm else 0)) / tensor
    return _STATISTIC * (heads + 2 * norm)


def reference_block_bytes(config: GPTConfig, tensor: int, selective: bool) -> float:
    """Megatron's formula for a GPT block in 16 bits with dropout, per token (arXiv:2205.05198).

    Equation 2, h * (10 + 24 / t + 5 a s / (h t)), and table 2's h * (10 + 24 / t) if attention's scores are
    computed again (`selective`); s is the context, a the number of heads.
    """
    c = config
    scores = 0.0 if selective else 5 * c.heads * c.context / (c.hidden * tensor)
    return c.hidden * (10 + 24 / tensor + scores)


@dataclass(frozen=True)
class Activations:
    """Bytes on a rank for one micro batch of one stage, on the device unless said.

    Attributes:
        kept: all that the forward pass keeps for the backward pass, but the loss's.
        sent: the tensor that a stage hands to the next, or the logits; 0 without a pipeline.
        received: the tensor that it takes from the stage before; 0 for the first.
        logits: what the loss keeps: log-probabilities, or logits; of one chunk, where it has chunks.
        loss_forward: what the loss needs beside `logits` while it is computed.
        loss_backward: the same in the backward pass.
        chunk: the gradient of a chunk's logits; 0 where the loss is computed at once.
        block_backward: what a block needs in its backward pass beside what it kept.
        waiting: what waits for weight gradients alone, of the schedule zb-h1.
        casts: weights in 16 bits that are kept until their backward pass, under torch_autocast.
        casts_forward: such weights that live during the forward pass alone.
        on_host: blocks' inputs that wait in host memory.
    """

    kept: float
    sent: float
    received: float
    logits: float
    loss_forward: float
    loss_backward: float
    chunk: float
    block_backward: float
    waiting: float
    casts: float
    casts_forward: float
    on_host: float


def activations(
    recipe: Recipe, layout: Layout, ds_config: dict[str, Any], first: int, last: int
) -> Activations:
    """The activations of a stage that runs layers first to last - 1 of the chain."""
    assert isinstance(recipe.model, GPTModel)
    c, tensor = recipe.model.shape, layout.grid["tensor"]
    tokens = layout.micro_batch * recipe.data.sequence_length
    sequence_parallel = recipe.parallel.sequence
    element, graph = precision(ds_config), compiled(recipe, layout, ds_config)
    hidden = c.hidden / tensor if sequence_parallel else c.hidden
    again = recipe.model.checkpoint_activations
    blocks = max(0, min(last, c.layers + 2) - max(first, 2))
    block = block_bytes(c, tensor, sequence_parallel, element, graph != "no")
    mask = 0.0
    if recipe.data.has_documents:
        # Attention keeps the mask as numbers to add to its scores, once a block.
        mask = element.product * recipe.data.sequence_length
    each = block + mask + _statistics(c, tensor)
    chunk = 0.0
    if recipe.model.mlp_chunks > 1:
        mlp = mlp_bytes(c, tensor, element, graph != "no")
        each, chunk = each - mlp, mlp / recipe.model.mlp_chunks
        if graph != "no":
            # Gradients of the chunks wait for each other, to become that of the MLP's input.
            chunk += 2 * element.product * c.hidden
    on_host = blocks * element.stream * hidden if recipe.model.cpu_checkpointing else 0.0
    kept = blocks * (element.stream * hidden if again else each) - on_host
    work = _block_work(c, again, graph) * (each + chunk) + (0.0 if again else chunk)
    head = last == c.layers + 4
    waiting = blocks * waiting_bytes(c, tensor, element)
    logits = loss_forward = loss_backward = 0.0
    chunks = recipe.model.loss_chunks
    if head:
        waiting += element.product * (c.hidden + -(-c.vocab // tensor))
        kept += element.stream * hidden + element.product * c.hidden
        logits, loss_forward, loss_backward = (n / chunks for n in _loss(c, tensor, element, graph))
        if chunks > 1:
            # Gradients of the chunks' inputs wait for each other, to become that of the norm's output.
            loss_backward += element.product * c.hidden
    pipeline = layout.grid["pipeline"] > 1
    sent = element.product * -(-c.vocab // tensor) if head else element.stream * hidden
    if pipeline and head:
        # The logits, which the engine keeps anyway.
        if graph == "no":
            loss_forward -= sent
        else:
            logits -= sent
    casts = casts_forward = 0.0
    if element.casts:
        matrices = [s for s in stage_shapes(c, tensor, first, last) if s.matrix]
        in_blocks = sum(s.numel for s in matrices if s.name not in ("token", "position", "output"))
        last_one = -(-c.vocab // tensor) * c.hidden if head else 0
        casts = element.product * (last_one + (0 if again else in_blocks))
        casts_forward = element.product * in_blocks if again else 0
    return Activations(
        kept=tokens * kept,
        sent=tokens * sent if pipeline else 0.0,
        received=tokens * element.stream * hidden if first > 0 else 0.0,
        logits=tokens * logits,
        loss_forward=tokens * loss_forward,
        loss_backward=tokens * loss_backward,
        chunk=tokens * sent / chunks if head and chunks > 1 else 0.0,
        block_backward=tokens * work,
        waiting=tokens * waiting if recipe.parallel.schedule == "zb-h1" else 0.0,
        casts=casts,
        casts_forward=casts_forward,
        on_host=tokens * on_host,
    )


def _block_work(config: GPTConfig, again: bool, graph: Compiled) -> float:
    """What a block's backward pass needs beside what is kept, in units of what a block keeps.

    With checkpointing (`again`), the block's activations are among it. Where the whole model is one
    graph, the compiler recomputes a block before the gradients of the next are gone.
    """
    if again:
        return 1.9 if graph == "model" else 1.3
    return 0.3 if config.mlp == "swiglu" else 0.5


def _loss(
    config: GPTConfig, tensor: int, element: Precision, graph: Compiled
) -> tuple[float, float, float]:
    """Bytes per token that the loss keeps, and needs beside that in the forward and backward pass.

    In units of this rank's logits: eager, 4 bytes of log-probabilities stay; the forward pass adds the
    logits and 4 bytes in fp32, the backward pass two gradients of 4. The vocab-parallel loss
    (`models/parallel/cross_entropy.py`) adds 10 in either. Compiled, the logits stay, vocab-parallel
    with the probabilities in fp32, and the gradient takes the logits' place if the graph has the
    output projection too.
    """
    logits = -(-config.vocab // tensor)
    if graph != "no":
        own = element.product * logits
        kept = own + (4 * logits if tensor > 1 else 0)
        return kept, 0.0, 0.0 if graph == "model" else own
    if tensor > 1:
        padded = 4 if config.vocab % tensor else 0
        both = (8 + element.product) * logits
        return 4 * logits, both + padded * logits, both
    full = 4 if element.product < 4 else 0
    return 4 * logits, (element.product + full) * logits, 8 * logits
