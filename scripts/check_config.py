"""Check any DeepSpeed JSON files for unknown keys, removed features and silent pitfalls.

python scripts/check_config.py my_config.json other_folder/
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

from launch.errors import explain_missing_packages

explain_missing_packages()

# The linter reads DeepSpeed's keys and needs no device; if this is unset, DeepSpeed probes for one
# and prints to stdout.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from launch.ds_json.finding import Finding, error
from launch.ds_json.linter import lint
from launch.ds_json.strict_json import load_json
from launch.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per finding; return 1 if there are errors. Invalid arguments: exit code 2."""
    parser = argparse.ArgumentParser(
        description="Check DeepSpeed JSON files for what DeepSpeed rejects, ignores or quietly "
        "takes otherwise.",
        epilog='Files below a folder called "hf" are taken for Hugging Face configs, where '
        '"auto" is allowed.',
    )
    parser.add_argument("files", nargs="+", metavar="FILES", help="JSON files or folders of them")
    parser.add_argument("--hf", action="store_true", help="all files are for Trainer or Accelerate")
    parser.add_argument(
        "--world-size", type=_ranks, metavar="N", help="ranks, to check batch sizes"
    )
    parser.add_argument("--strict", action="store_true", help="fail on warnings too")
    parser.add_argument("--json", action="store_true", help="print a JSON list of findings")
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for keys that a terminal cannot show
    found: list[tuple[Path, Finding]] = []
    files = [file for name in options.files for file in _expand(Path(name))]
    for file in files:
        found += [(file, finding) for finding in _check(file, options.hf, options.world_size)]
    if options.json:
        print(json.dumps([{"file": str(f), **finding.as_dict()} for f, finding in found], indent=2))
    else:
        for file, finding in found:
            print(f"{file}: {finding.line()}")
        print(_summary(len(files), [finding for _, finding in found]))
    failing = {"error", "warning"} if options.strict else {"error"}
    return int(any(finding.level in failing for _, finding in found))


def _ranks(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _expand(path: Path) -> list[Path]:
    # An empty folder stays in the list, so that it is reported instead of silently passing.
    return (sorted(path.rglob("*.json")) or [path]) if path.is_dir() else [path]


def _check(file: Path, hf: bool, world_size: int | None) -> list[Finding]:
    if file.is_dir():
        return [error("", "unreadable", "no *.json in this folder")]
    try:
        config = load_json(file)
    except UserError as problem:
        return [error("", "unreadable", str(problem).removeprefix(str(file)).lstrip(": "))]
    in_hf_folder = "hf" in file.resolve().parent.parts
    return lint(config, hf=hf or in_hf_folder, world_size=world_size)


def _summary(files: int, findings: list[Finding]) -> str:
    count = f"{files} file" + ("s" if files != 1 else "")
    if not findings:
        return f"{count}, no findings"
    errors = sum(finding.level == "error" for finding in findings)
    return f"{count}, {errors} errors, {len(findings) - errors} warnings"


if __name__ == "__main__":
    sys.exit(main())
