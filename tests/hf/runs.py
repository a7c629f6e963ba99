"""A finished run's folder, without the run."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def recipe(model: dict[str, Any], **data: Any) -> dict[str, Any]:
    """A recipe's values with this model block."""
    return {
        "name": "small",
        "model": model,
        "data": {"tokenizer": "bytes", "sequence_length": 16, **data},
        "train": {"steps": 2, "global_batch_size": 8, "micro_batch_size": 8},
        "deepspeed": {"config": "ds_configs/zero1.json"},
    }


def finished_run(
    folder: Path, model: dict[str, Any], weights: Path | Mapping[str, Tensor], **data: Any
) -> Path:
    """Write a run's recipe, losses and weights, which are those of a folder, or given."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(json.dumps(recipe(model, **data)))
    records: list[dict[str, Any]] = [{"step": step, "loss": 5.5 - step / 2} for step in (1, 2)]
    records.append({"step": 2, "validation_loss": 4.75})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if isinstance(weights, Path):
        for file in weights.glob("model*.safetensors*"):
            shutil.copy(file, folder)
    else:
        detached = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
        save_file(detached, folder / "model.safetensors")
    return folder
