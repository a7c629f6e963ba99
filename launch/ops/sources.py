"""Have DeepSpeed's ops compiled in a fraction of the time, on a CPU.

Most of that time goes into torch's headers, once a file. async_io is twelve files, nine of which, its
Python layer, include them: those become one file. Debugging symbols are left out.
"""

import shutil
from pathlib import Path
from typing import Any


def compile_faster(builder: Any, folder: Path) -> None:
    """Change what a builder will compile; `folder` is where it builds.

    Args:
        builder: DeepSpeed's builder of an op.
        folder: gets copies of the sources, if files are joined.
    """
    arguments = builder.cxx_args()
    builder.cxx_args = lambda: [argument for argument in arguments if argument != "-g"]
    if builder.name == "async_io":
        _join_python_layer(builder, folder / "sources")


def _join_python_layer(builder: Any, copies: Path) -> None:
    """One file that includes those of py_lib, and copies of the headers, which lack include guards."""
    shutil.rmtree(copies, ignore_errors=True)
    for part in ("aio", "pin_memory"):
        shutil.copytree(builder.deepspeed_src_path(f"csrc/{part}"), copies / part)
    for header in copies.rglob("*.h"):
        header.write_text(f"#pragma once\n{header.read_text()}")
    places = [str(copies / Path(source).relative_to("csrc")) for source in builder.sources()]
    joined = [place for place in places if "/py_lib/" in place]
    whole = copies / "py_lib.cpp"
    whole.write_text("".join(f'#include "{place}"\n' for place in joined))
    include = [
        str(copies / Path(path).relative_to("csrc")) if path.startswith("csrc/") else path
        for path in builder.include_paths()
    ]
    builder.sources = lambda: [str(whole), *(place for place in places if place not in joined)]
    builder.include_paths = lambda: include
