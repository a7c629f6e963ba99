"""Build DeepSpeed's C++ ops ahead of time, so that training does not wait for them."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

from launch.errors import explain_missing_packages

explain_missing_packages()

import argparse
import time

from launch.ops.builder import OPS, build_ops, use_private_cache
from launch.runtime.failures import one_line_errors

CPU_OPS = ["cpu_adam", "async_io"]  # optimizer offload and NVMe offload


def main() -> None:
    """Build the ops given on the command line, and print build times and paths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"ops to build (default: {' '.join(CPU_OPS)}); known: {' '.join(OPS)}",
    )
    names = parser.parse_args().names or CPU_OPS
    if unknown := [name for name in names if name not in OPS]:
        parser.error(f"unknown op {unknown[0]}; choose from {', '.join(OPS)}")
    with one_line_errors():
        cache = use_private_cache()
        for name in names:
            start = time.monotonic()
            build_ops([name], lambda line: print(line, flush=True))
            print(f"{name}: ready after {time.monotonic() - start:.1f} s in {cache / name}")


if __name__ == "__main__":
    main()
