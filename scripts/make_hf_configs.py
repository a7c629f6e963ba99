"""Write ds_configs/hf/: the same configs for transformers' Trainer and for Accelerate.

python scripts/make_hf_configs.py           # write them
python scripts/make_hf_configs.py --check   # exit 1 if one is missing, outdated or left over

Values that Hugging Face sets become "auto", so that its arguments and the JSON cannot conflict:
batch sizes, clipping, precision, and the bucket sizes that Trainer derives from the model's width
at ZeRO-3. The optimizer is omitted: Trainer then builds AdamW from its arguments, and Accelerate
uses the one in the script (both replace it with CPUAdam for offload). "auto" would work for
Trainer, but Accelerate cannot fill in betas and eps.
"""

import argparse
import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

from launch.ds_json.strict_json import load_json
from launch.paths import ROOT
from launch.runtime.failures import one_line_errors

_AUTO = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
_AUTO_AT_STAGE_3 = (
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)


def hugging_face_twin(config: dict[str, Any]) -> dict[str, Any]:
    """A complete config with "auto" for every value that Hugging Face sets."""
    twin = {"train_batch_size": "auto", **copy.deepcopy(config)}
    for key in _AUTO:
        twin[key] = "auto"
    # Trainer does its own logging, and Accelerate sets this key.
    for key in ("optimizer", "steps_per_print"):
        twin.pop(key, None)
    # Keep a literal false: these files compute with fp32 weights, and Trainer's --bf16 must not
    # go unnoticed.
    for precision in ("bf16", "fp16"):
        if twin.get(precision, {}).get("enabled"):
            twin[precision]["enabled"] = "auto"
    if twin["zero_optimization"]["stage"] == 3:
        for key in _AUTO_AT_STAGE_3:
            twin["zero_optimization"][key] = "auto"
    return twin


def as_text(config: dict[str, Any]) -> str:
    """The file's text: two-space indent, short lists of numbers on one line."""
    text = json.dumps(config, indent=2)
    return re.sub(r"\[\s+([\d.e-]+),\s+([\d.e-]+)\s+\]", r"[\1, \2]", text) + "\n"


def main() -> int:
    """Write or compare; return 1 if `--check` finds a difference."""
    parser = argparse.ArgumentParser(description="Generate ds_configs/hf/ from ds_configs/*.json.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing, exit 1 on a difference"
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "ds_configs", help="where the configs lie"
    )
    options = parser.parse_args()
    folder = options.folder / "hf"
    wanted = {
        source.name: as_text(hugging_face_twin(load_json(source)))
        for source in sorted(options.folder.glob("*.json"))
    }
    present = {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.json")}
    differing = sorted(
        name for name in wanted.keys() | present.keys() if wanted.get(name) != present.get(name)
    )
    if options.check:
        for name in differing:
            print(f"{folder / name}: differs; run python scripts/make_hf_configs.py")
        return int(bool(differing))
    folder.mkdir(exist_ok=True)
    for name in differing:
        if name in wanted:
            (folder / name).write_text(wanted[name], encoding="utf-8")
        else:
            (folder / name).unlink()
    print(f"{len(wanted)} configs in {folder}, {len(differing)} changed")
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
