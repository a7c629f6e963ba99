"""torch_autocast: parameters that DeepSpeed sends in 16 bits, and more than a matrix product uses."""

from collections import Counter

from deepspeed.runtime import engine as engine_module
from deepspeed.runtime import torch_autocast
from deepspeed.runtime.engine import DeepSpeedEngine


def keep_tied_parameters_in_their_dtype() -> None:
    """Keep DeepSpeed from rounding parameters that modules share. Call it before an engine is built.

    Defect: with torch_autocast, DeepSpeed marks each parameter of a linear layer to be sent in 16 bits, as
        the layer casts it anyway. At ZeRO-3 that is also what the embedding that is tied to it is
        gathered in, which autocast leaves in fp32: on GPUs the first loss is 6e-6 off.
    Versions: DeepSpeed 0.19.8.
    Workaround: take the mark from parameters that more than one module holds.
    Proof: test_autocast.py::test_a_tied_embedding_is_gathered_in_16_bits
    """
    mark = torch_autocast.init_autocast_params

    def mark_the_others(engine: DeepSpeedEngine, *settings: object) -> None:
        mark(engine, *settings)
        held = Counter(
            parameter
            for module in engine.module.modules()
            for parameter in module.parameters(recurse=False)
        )
        for parameter, modules in held.items():
            if modules > 1 and torch_autocast.has_comm_dtype(parameter):
                delattr(parameter, torch_autocast.PARAM_COMM_DTYPE_ATTR_NAME)

    engine_module.init_autocast_params = mark_the_others
