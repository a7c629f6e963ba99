"""Whether DeepSpeed takes a config: its own reader, and its engine's own code for the optimizer.

The engine is made without a model: its methods run on an object that holds the parsed config and
nothing else. DeepSpeed's C++ ops are stand-ins, so that nothing is compiled.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import MagicMock, patch

from launch.ds_json.deepspeed_reader import quiet


def refused(config: dict[str, Any], ranks: int) -> str:
    """Why DeepSpeed refuses a config on so many data parallel ranks; empty if it takes it."""
    config = copy.deepcopy(config)
    sequence = config.get("sequence_parallel_size")
    if isinstance(sequence, int) and sequence > 0:
        ranks *= sequence
    if isinstance(config.get("aio"), dict):
        config["aio"].pop("use_gds", None)  # asks for a GPU
    try:
        with _elsewhere(ranks), quiet():
            _start(config)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return ""


def _start(config: dict[str, Any]) -> None:
    import torch
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine

    engine = object.__new__(DeepSpeedEngine)
    torch.nn.Module.__init__(engine)
    parsed = DeepSpeedConfig(config)
    vars(engine).update(
        _config=parsed,
        client_optimizer=None,
        client_lr_scheduler=None,
        pipeline_parallelism=False,  # by the model, not by the config
        has_moe_layers=False,
        global_rank=0,
        zenflow=False,
    )
    engine._do_sanity_check()
    engine._mixed_precision_dtypes()
    engine.get_data_types()
    matrix: Any = torch.nn.Parameter(torch.zeros(2, 2))
    vector: Any = torch.nn.Parameter(torch.zeros(2))
    matrix.use_muon, vector.use_muon = True, False
    if engine.optimizer_name() is None:
        # The script brings its own.
        optimizer: Any = torch.optim.AdamW([matrix, vector])
    else:
        optimizer = engine._configure_basic_optimizer([matrix, vector])
        engine._do_optimizer_sanity_check(optimizer)
    schedule = config.get("scheduler", {}).get("params")
    lists = [len(v) for v in (schedule or {}).values() if isinstance(v, list)]
    if lists:
        # A list has a value for each of the groups of parameters that the script makes.
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(max(lists) or 1)]
        optimizer = torch.optim.AdamW(groups)
    engine._scheduler_from_config(optimizer)


@contextmanager
def _elsewhere(ranks: int) -> Iterator[None]:
    """So many ranks, on a machine that computes in fp16 and has DeepSpeed's ops."""
    from deepspeed import comm
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.ops.op_builder.cpu.no_impl import NotImplementedBuilder

    with ExitStack() as stack:
        stack.enter_context(patch.object(comm, "get_rank", lambda: 0))
        stack.enter_context(patch.object(comm, "get_world_size", lambda: ranks))
        for builder in (OpBuilder, NotImplementedBuilder):
            stack.enter_context(patch.object(builder, "load", lambda *_, **__: MagicMock()))
        stack.enter_context(patch("cpuinfo.get_cpu_info", dict))  # takes a second
        stack.enter_context(
            patch.object(type(get_accelerator()), "is_fp16_supported", lambda _: True)
        )
        yield
