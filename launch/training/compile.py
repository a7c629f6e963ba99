"""torch.compile for each kind of engine: which parts are compiled and which stay outside."""

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine

from models.gpt import GPT, Block


def gather_whole_blocks(model: GPT) -> None:
    """Make ZeRO-3 gather and release whole blocks. Call it before `deepspeed.initialize`.

    By default, ZeRO-3 gathers each linear layer and norm separately: 12 hooks in a block's forward
    pass, and small messages. GPT 1.3B on 2 x H100 was 1.26 times as fast with whole blocks
    (recipes/BENCHMARKS.md). A rank needs memory for the largest block.
    """
    deepspeed.utils.set_z3_leaf_modules(model, [Block])


def compile_engine(engine: DeepSpeedEngine) -> None:
    """Compile the engine's model.

    - ZeRO 0 to 2: the whole model, loss included.
    - A pipeline: each block.
    - ZeRO-3: the forward pass of each block. DeepSpeed's hooks, which gather a block's weights
      before it and release them after it, run outside the compiled code: torch must not trace them.
    """
    if isinstance(engine, PipelineEngine):
        for module in engine.module.modules():
            if isinstance(module, Block):
                module.compile()
    elif engine.zero_optimization_stage() == 3:
        for module in engine.module.modules():
            if isinstance(module, Block):
                # Set on the instance, where nn.Module calls it; `module.compile()` includes hooks.
                object.__setattr__(module, "forward", torch.compile(module.forward))
    else:
        engine.compile()
