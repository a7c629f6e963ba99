"""Write the weights of a run or checkpoint as a folder that transformers opens with no code of ours.

.venv/bin/python scripts/export_hf.py runs/gpt_tiny_zero2/<time> exported --dtype bf16
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

import argparse

from launch.runtime.failures import one_line_errors


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(
        description="Export a run or a checkpoint for AutoModelForCausalLM.from_pretrained: weights as "
        "safetensors, configuration, tokenizer, and a model card with the recipe and the losses."
    )
    parser.add_argument(
        "run",
        type=Path,
        help="a checkpoint; a run folder, for its final weights or its newest checkpoint; or "
        "runs/<recipe>, for its newest finished run",
    )
    parser.add_argument("out", type=Path, help="the folder to create")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32", "fp16"), help="of the weights (default: as stored)"
    )
    parser.add_argument(
        "--family",
        help="of transformers, where several compute the same: mistral in place of llama",
    )
    parser.add_argument("--license", help="for the model card, as the Hub names it: apache-2.0")
    arguments = parser.parse_args()
    with one_line_errors():
        from launch.hf.export import export
        from launch.hf.read_weights import DTYPE_NAMES, weights_of

        dtype = DTYPE_NAMES[arguments.dtype] if arguments.dtype else None
        weights = weights_of(arguments.run)
        export(weights, arguments.out, dtype, arguments.family, arguments.license)
        print(f"{arguments.out}: open it with AutoModelForCausalLM.from_pretrained")


if __name__ == "__main__":
    main()
