"""Command-line arguments shared by all commands that take a recipe."""

import argparse


def add_recipe_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add `--config RECIPE` and `--set KEY=VALUE ...`, the inputs of `load.load_recipe`."""
    parser.add_argument(
        "--config", required=required, metavar="RECIPE", help="a recipe file, recipes/*.yaml"
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change keys of the recipe; below deepspeed., of its DeepSpeed JSON",
    )
