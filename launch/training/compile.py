"""torch.compile, for each kind of engine: what is compiled, and what stays outside of the graph."""

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine

from models.gpt import GPT, Block


def gather_whole_blocks(model: GPT) -> None:
    """Make ZeRO-3 gather and release a block's weights at once. Call it before `deepspeed.initialize`.

    By default ZeRO-3 does so for each linear layer and norm: 12 hooks in a block's forward pass, and
    messages that are small. GPT 1.3B on 2 x H100 was 1.26 times as fast with whole blocks
    (recipes/BENCHMARKS.md). A rank needs room for the largest block, whole.
    """
    deepspeed.utils.set_z3_leaf_modules(model, [Block])


def compile_engine(engine: DeepSpeedEngine) -> None:
    """Compile the engine's model.

    - ZeRO 0 to 2: the whole model, loss included.
    - A pipeline: each block. What lies between the blocks of a stage is messages.
    - ZeRO-3: the forward pass of each block. DeepSpeed's hooks, which gather the block's weights before
      it and release them behind it, run around the compiled code: torch must not trace them.
    """
    if isinstance(engine, PipelineEngine):
        for module in engine.module.modules():
            if isinstance(module, Block):
                module.compile()
    elif engine.zero_optimization_stage() == 3:
        for module in engine.module.modules():
            if isinstance(module, Block):
                # On the instance, where nn.Module calls it; `module.compile()` would take the hooks in.
                object.__setattr__(module, "forward", torch.compile(module.forward))
    else:
        engine.compile()
