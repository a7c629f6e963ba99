"""Write all weights of a run or checkpoint to one safetensors file, under the names of `models/gpt.py`.

.venv/bin/python scripts/consolidate.py runs/gpt_tiny_zero2/<time> weights.safetensors
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

import argparse

from launch.runtime.failures import one_line_errors


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(
        description="Write one file with the whole weights of a run or checkpoint, of any layout."
    )
    parser.add_argument(
        "run",
        type=Path,
        help="a checkpoint; a run folder, for its final weights or its newest checkpoint; or "
        "runs/<recipe>, for its newest finished run",
    )
    parser.add_argument("out", type=Path, help="the file to create")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp16"), default="fp32")
    arguments = parser.parse_args()
    with one_line_errors():
        from launch.hf.export import consolidate
        from launch.hf.read_weights import DTYPE_NAMES, weights_of

        weights = weights_of(arguments.run)
        consolidate(weights, arguments.out, DTYPE_NAMES[arguments.dtype])
        print(f"{arguments.out}: {len(weights.shapes)} tensors in {arguments.dtype}")


if __name__ == "__main__":
    main()
