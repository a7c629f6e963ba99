"""Copy a checkpoint into a new run folder, a few large files for any layout, and say who can resume it.

python scripts/reshape.py runs/gpt_tiny_zero2/<time> new --config recipes/gpt_tiny_tp2_zero1.yaml --ranks 4
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

import argparse
from collections.abc import Sequence

from launch.config.cli_args import add_recipe_arguments
from launch.errors import UserError
from launch.runtime.failures import one_line_errors


def main() -> None:
    """Command-line entry point."""
    arguments = parse_arguments()
    with one_line_errors():
        run(arguments)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `arguments`."""
    parser = argparse.ArgumentParser(
        description="Copy a checkpoint into a new run folder. No layout needs this to resume: "
        "launch/train.py --resume reads what any layout has saved.",
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a checkpoint, or a run folder for its newest"
    )
    parser.add_argument("out", type=Path, help="the new run folder, for --resume")
    add_recipe_arguments(parser, required=False)
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="the ranks that --config is to run on"
    )
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Check that the recipe can resume the checkpoint, copy it, and say what was done.

    Raises:
        UserError: if the checkpoint is damaged, of another run than the recipe, or OUT is in use.
    """
    from launch.checkpoint.manifest import newest_complete, read_manifest
    from launch.checkpoint.whole import check_complete, reshape
    from launch.runtime.run_dir import RunDir

    path: Path = arguments.checkpoint.expanduser().absolute()
    if (path / "checkpoints").is_dir():
        newest, damaged = newest_complete(RunDir(path))
        if newest is None:
            raise UserError(
                f"{path}: no complete checkpoint ({'; '.join(damaged) or 'none saved'})"
            )
        path = newest
    else:
        check_complete(path)
    if arguments.config:
        print(_change(arguments, path))
    copy = reshape(path, RunDir(arguments.out.expanduser().absolute()))
    manifest = read_manifest(copy)
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    print(
        f"step {manifest['step']}: {len(manifest['tensors'])} parameters, {size / 2**20:.1f} MiB in "
        f"{copy}; go on with --resume {arguments.out}"
    )


def _change(arguments: argparse.Namespace, checkpoint: Path) -> str:
    from launch.checkpoint.identity import check, identity
    from launch.checkpoint.manifest import read_manifest
    from launch.config.layout import plan_layout
    from launch.config.load import load_recipe
    from launch.config.resolve import resolve

    recipe = load_recipe(arguments.config, arguments.set)
    layout = plan_layout(recipe, arguments.ranks or recipe.parallel.model_parallel_size)
    manifest = read_manifest(checkpoint)
    now = identity(recipe, resolve(recipe, layout), layout, manifest["corpus"])
    _, change = check(checkpoint, now, recipe.train.steps)
    return f"{recipe.name} can resume it; {change or 'its layout is the same'}"


if __name__ == "__main__":
    main()
