"""The arguments that every command on a recipe takes."""

import argparse


def add_recipe_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add `--config RECIPE` and `--set KEY=VALUE ...`; both go to `launch.config.load.load_recipe`."""
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
