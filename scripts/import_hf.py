"""Write a model of transformers as a folder that a recipe starts from: `model.init_from`.

.venv/bin/python scripts/import_hf.py Qwen/Qwen3-0.6B imported/qwen3
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

import argparse

from launch.runtime.failures import one_line_errors


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(
        description="Import a GPT-2, GPT-NeoX, Llama, Qwen3 or Mistral model: weights under our names, "
        "the model block of a recipe (model.yaml) and the tokenizer. Reads only safetensors, and runs "
        "no code that comes with a model."
    )
    parser.add_argument("source", help="a folder, or a name on the Hub")
    parser.add_argument("out", type=Path, help="the folder to create")
    arguments = parser.parse_args()
    with one_line_errors():
        from launch.hf.import_model import import_model

        print(import_model(arguments.source, arguments.out))


if __name__ == "__main__":
    main()
