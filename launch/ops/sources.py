"""Have DeepSpeed's ops compiled in a fraction of the time, on a CPU.

Most of that time goes into torch's headers, once a file. So an op's files that include them become one,
and it gets the headers for tensors and Python alone: torch/extension.h includes all of torch's C++ library.
Debugging symbols are left out.
"""

import shutil
from pathlib import Path
from typing import Any

# What the ops use of torch/extension.h: tensors and their functions, and tensors as arguments from Python.
HEADER = "#pragma once\n#include <torch/types.h>\n#include <torch/csrc/utils/pybind.h>\n"
# The folders of sources that include torch's headers.
WITH_TORCH = {
    "cpu_adam": "adam/",
    "cpu_adagrad": "adagrad/",
    "cpu_lion": "lion/",
    "pin_memory": "pin_memory/",
    "async_io": "aio/py_lib/",
}


def compile_faster(builder: Any, folder: Path) -> None:
    """Change what a builder will compile; `folder` is where it builds.

    Args:
        builder: DeepSpeed's builder of an op.
        folder: gets copies of the sources, and the smaller header.
    """
    arguments = builder.cxx_args()
    builder.cxx_args = lambda: [argument for argument in arguments if argument != "-g"]
    if builder.name in WITH_TORCH:
        _join(builder, folder / "sources", WITH_TORCH[builder.name])


def _join(builder: Any, copies: Path, part: str) -> None:
    """One file that includes those of a part, and copies of the headers, which lack include guards."""
    shutil.rmtree(copies, ignore_errors=True)
    shutil.copytree(
        builder.deepspeed_src_path("csrc"), copies, ignore=shutil.ignore_patterns("*.cu")
    )
    for header in copies.rglob("*.h"):
        header.write_text(f"#pragma once\n{header.read_text()}")
    (copies / "torch").mkdir()
    (copies / "torch/extension.h").write_text(HEADER)
    places = [str(copies / Path(source).relative_to("csrc")) for source in builder.sources()]
    joined = [place for place in places if f"{copies}/{part}" in place]
    whole = copies / f"{builder.name}_whole.cpp"
    whole.write_text("".join(f'#include "{place}"\n' for place in joined))
    include = [
        str(copies / Path(path).relative_to("csrc")) if path.startswith("csrc/") else path
        for path in builder.include_paths()
    ]
    builder.sources = lambda: [str(whole), *(place for place in places if place not in joined)]
    builder.include_paths = lambda: [str(copies), *include]
