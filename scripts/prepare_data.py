"""Tokenise a recipe's data ahead of time, for example on a login node before GPUs are allocated.

The run then finds the tokens in the same cache folder (`data.cache_dir`) and starts immediately.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

from launch.errors import explain_missing_packages

explain_missing_packages()

import argparse

from launch.config.cli_args import add_recipe_arguments
from launch.config.load import load_recipe
from launch.data.prepare import prepare, tokens_needed
from launch.runtime.failures import one_line_errors


def main() -> None:
    """Tokenise the recipe's data and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_recipe_arguments(parser)
    arguments = parser.parse_args()
    with one_line_errors():
        recipe = load_recipe(arguments.config, arguments.set)
        corpus = prepare(recipe.data, tokens_needed=tokens_needed(recipe))
        length = recipe.data.sequence_length
        tokens = len(corpus.train) + len(corpus.held_out)
        print(f"documents        {corpus.documents:,}")
        for name, part in (("train", corpus.train), ("held-out", corpus.held_out)):
            sequences = max(part.sequences(length), 0)
            print(f"{name:<17}{len(part):,} tokens, {sequences:,} sequences of {length}")
        print(f"bytes per token  {corpus.text_bytes / tokens:.2f}")
        print(f"cache            {corpus.folder}")


if __name__ == "__main__":
    main()
