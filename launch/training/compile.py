"""torch.compile for each kind of engine: which parts are compiled and which stay outside."""

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from launch.config.layout import compiled_as_whole
from models.gpt import GPT, Block, Loss
from models.parallel.grid import Grid


def gather_whole_blocks(model: GPT) -> None:
    """Make ZeRO-3 gather and release whole blocks. Call it before `deepspeed.initialize`.

    By default, ZeRO-3 gathers each linear layer and norm separately: 12 hooks in a block's forward
    pass, and small messages. GPT 1.3B on 2 x H100 was 1.26 times as fast with whole blocks
    (recipes/BENCHMARKS.md). A rank needs memory for the largest block.
    """
    deepspeed.utils.set_z3_leaf_modules(model, [Block])


def compile_engine(engine: DeepSpeedEngine, grid: Grid, cuda_graphs: bool = False) -> None:
    """Compile the engine's model.

    - ZeRO 0 to 2: the whole model, loss included. With `cuda_graphs`, its forward and its backward pass
      are recorded once, and launched as one after that: weights, inputs and activations keep their
      places. A graph has one shape, so the growing text of a sample runs without. A pass is recorded whole
      or not at all: cut into pieces at what it takes for dynamic sizes, torch 2.11 lost the value of a loss
      in chunks, and stopped with recomputed blocks.
    - A pipeline and ZeRO-3: each block, and the loss. DeepSpeed's hooks, which gather a block's weights
      before it and release them after it, run outside the compiled code: torch must not trace them.
    - ZeRO-2 on several ranks likewise: the gradients of a model compiled as a whole all come at the end
      of its backward pass, too late to reduce some while others are computed. But a transformers model,
      which has none of our blocks, is compiled as a whole.
    - Checkpoints on the CPU likewise: torch does not trace the hooks that move them.

    With tensor parallel ranks, a wait for a collective is moved behind what does not need its result,
    such as a weight gradient. Where blocks are recomputed, it is moved as far as memory does not grow:
    torch would else recompute the attention of all blocks before it uses the first of them.

    Tensor parallel ranks' compiled code rounds to 16 bits where eager code does. A row-parallel
    layer adds its bias after the sum over the ranks; fused with what follows, in fp32, the bias keeps
    digits that one device rounds away. At GPT 1.3B in bf16 that changed the loss of step 2 by 2%
    (models/README.md), and the throughput is the same either way.
    """
    options: dict[str, Any] = {}
    if cuda_graphs:
        options |= {
            "triton.cudagraphs": True,
            "triton.cudagraph_skip_dynamic_graphs": True,
            "graph_partition": False,
        }
    if grid["tensor"] > 1:
        recomputed = getattr(engine.module, "checkpoint_activations", False)
        options |= {
            "emulate_precision_casts": True,
            "reorder_for_compute_comm_overlap": True,
            "reorder_for_compute_comm_overlap_passes": (
                ["sink_waits_iterative"] if recomputed else ["raise_comms", "sink_waits"]
            ),
        }
    parts = [m for m in engine.module.modules() if isinstance(m, (Block, Loss))]
    settings: dict[str, Any] = {"options": options or None}
    on_cpu = getattr(engine.module, "cpu_checkpointing", False)
    if not parts or compiled_as_whole(grid, engine.zero_optimization_stage(), on_cpu):
        engine.compile(compile_kwargs=settings)
        return
    for part in parts:
        # Set on the instance, where nn.Module calls it; `module.compile()` includes hooks.
        object.__setattr__(part, "forward", torch.compile(part.forward, **settings))
