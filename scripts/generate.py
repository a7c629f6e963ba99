"""Generate text on one device, with the recipe and final weights of a run folder.

.venv/bin/python scripts/generate.py runs/gpt_tiny_zero2/<time> --prompt "import "
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

import argparse

from launch.errors import UserError
from launch.runtime.failures import one_line_errors


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Sample text from a finished run.")
    parser.add_argument("run", type=Path, help="a run folder, or runs/<recipe> for its newest run")
    parser.add_argument("--prompt", help="what the text starts with (default: the recipe's)")
    parser.add_argument("--tokens", type=int, default=300, help="at most this many new tokens")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest token"
    )
    parser.add_argument("--top-k", type=int, default=50, help="draw from the k likeliest tokens")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with one_line_errors():
        print(generate(arguments))


def generate(arguments: argparse.Namespace) -> str:
    """Load the run's model and sample text, which includes the prompt.

    Raises:
        UserError: if the folder has no finished run.
    """
    if arguments.tokens < 1 or arguments.top_k < 1 or arguments.temperature < 0:
        raise UserError("--tokens and --top-k start at 1, --temperature at 0")
    from launch.runtime.run_dir import newest_finished, read_settings

    folder = newest_finished(arguments.run)

    import torch

    from launch.checkpoint.safetensors_io import load_weights
    from launch.data.tokenizer import load_tokenizer
    from launch.training.build_model import build_model
    from launch.training.sampling import sample

    recipe = read_settings(folder).without_init_from().with_adapters_merged()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    model = build_model(recipe, torch.bfloat16 if gpu else torch.float32, device)
    load_weights(model, folder)
    model.eval()
    return sample(
        model,
        load_tokenizer(recipe.data.tokenizer),
        recipe.run.sample_prompt if arguments.prompt is None else arguments.prompt,
        arguments.tokens,
        recipe.data.sequence_length,
        device,
        arguments.temperature,
        arguments.top_k,
        arguments.seed,
    )


if __name__ == "__main__":
    main()
