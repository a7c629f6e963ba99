"""What the config tests train: run in ranks of their own by `run_ranks`."""

import json
import os
from typing import Any

STEPS = 8
OPS = {"cpu_adam": "offload_optimizer", "async_io": '"nvme"'}


def _start(config: dict[str, Any]) -> None:
    import deepspeed

    from launch.deepspeed_patches.startup import skip_shared_memory_op
    from launch.ops.builder import build_ops

    deepspeed.utils.logger.setLevel("ERROR")
    skip_shared_memory_op()
    text = json.dumps(config)  # loaded, so that DeepSpeed compiles nothing here
    build_ops([op for op, key in OPS.items() if key in text], print)


def _allow_fp16_on_cpu(config: dict[str, Any]) -> None:
    # DeepSpeed asks whether this CPU has fp16 instructions and rejects where not; torch computes
    # fp16 on any. The loss scaling, the casts and ZeRO's buckets below are the real ones.
    from deepspeed.accelerator import get_accelerator

    if config.get("fp16", {}).get("enabled") and get_accelerator().device_name() == "cpu":
        type(get_accelerator()).is_fp16_supported = lambda self: True


def train_raw(config: dict[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """Train a small language model with `deepspeed.initialize` and nothing else of ours."""
    import deepspeed
    import torch
    from torch import nn

    _start(config)
    _allow_fp16_on_cpu(config)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(64, 128), nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64)
    )  # fmt: skip
    engine, _, _, _ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config
    )
    rank = int(os.environ["RANK"])
    generator = torch.Generator().manual_seed(rank)
    inputs = torch.randint(0, 64, (4, 16), generator=generator).to(engine.device)
    labels = (inputs * 3 + 1) % 64
    losses, norms = [], []
    for _ in range(steps):
        logits = engine(inputs)
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        norms.append(engine.get_global_grad_norm())
    weights = _gathered(list(model.parameters()))
    return {
        "losses": losses,
        "norms": [None if norm is None else float(norm) for norm in norms],
        "optimizer": type(engine.optimizer).__name__,
        "adam": type(engine.basic_optimizer).__name__,
        "weights": weights,
        "dtype": str(next(model.parameters()).dtype),
        "clipping": engine.gradient_clipping(),
    }


def _gathered(parameters: list[Any]) -> list[float]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        return [parameter.detach().double().sum().item() for parameter in parameters]


def _tiny_gpt2() -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
            eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def _rows(count: int) -> list[dict[str, Any]]:
    import torch

    ids = torch.arange(16) * 3 % 64
    return [{"input_ids": ids, "labels": ids} for _ in range(count)]


def train_with_trainer(config: dict[str, Any], folder: str, precision: str) -> dict[str, Any]:
    """Train with transformers' real Trainer; return losses and what became of the config."""
    import torch
    from transformers import Trainer, TrainingArguments

    _start(config)
    _allow_fp16_on_cpu({"fp16": {"enabled": precision == "fp16"}})
    settings: dict[str, Any] = {
        "output_dir": folder, "deepspeed": config, "max_steps": STEPS, "logging_steps": 1,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 3e-3,
        "max_grad_norm": 0.5, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "bf16": precision == "bf16", "fp16": precision == "fp16",
        "adam_beta2": 0.95, "weight_decay": 0.2,
        # Trainer believes in bf16 on a CPU only when told that there is no GPU.
        "use_cpu": precision == "bf16" and not torch.cuda.is_available(),
    }  # fmt: skip
    trainer = Trainer(
        model=_tiny_gpt2(),
        args=TrainingArguments(**settings),
        train_dataset=_rows(64),
    )
    trainer.train()
    engine = trainer.deepspeed
    group = engine.basic_optimizer.param_groups[0]
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "dtype": str(next(engine.module.parameters()).dtype),
        "clipping": engine.gradient_clipping(),
        "accumulation": engine.gradient_accumulation_steps(),
        "stage": engine.zero_optimization_stage(),
        "adam": type(engine.basic_optimizer).__name__,
        "betas": list(group["betas"]),
        "weight_decay": group["weight_decay"],
    }


def train_with_accelerate(config: dict[str, Any], precision: str) -> dict[str, Any]:
    """Train with the real Accelerator and DeepSpeedPlugin, the optimizer made by the script."""
    import torch
    from accelerate import Accelerator, DeepSpeedPlugin
    from torch.utils.data import DataLoader

    _start(config)
    _allow_fp16_on_cpu({"fp16": {"enabled": precision == "fp16"}})
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision=precision)
    model = _tiny_gpt2()
    optimizer: Any
    if "optimizer" in config:
        from accelerate.utils import DummyOptim

        optimizer = DummyOptim(model.parameters(), lr=3e-3)
    else:
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.2
        )
    rows: Any = _rows(16)  # a list is a map-style data set, though not by its type
    loader: Any = DataLoader(rows, batch_size=2)
    engine, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        with accelerator.accumulate(engine):
            loss = engine(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    group = engine.basic_optimizer.param_groups[0]
    return {
        "losses": losses,
        "dtype": str(next(engine.module.parameters()).dtype),
        "stage": engine.zero_optimization_stage(),
        "adam": type(engine.basic_optimizer).__name__,
        "betas": list(group["betas"]),
        "weight_decay": group["weight_decay"],
    }
