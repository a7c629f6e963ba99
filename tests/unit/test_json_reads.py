"""The DeepSpeed JSON is read in launch/ds_json alone: elsewhere its view says what it asks for."""

import ast
from collections.abc import Iterator
from pathlib import Path

from launch.paths import ROOT

BLOCKS = {
    "zero_optimization", "bf16", "fp16", "torch_autocast", "data_types", "optimizer", "pipeline",
    "tensor_parallel", "scheduler", "aio",
}  # fmt: skip
CONFIGS = {"config", "ds_config", "resolve", "load_json"}
READERS = {"ds_json"}


def raw_reads(source: str) -> Iterator[int]:
    """Lines in which a block is taken out of a DeepSpeed configuration; writing one is no reading."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Subscript(value=place, slice=ast.Constant(value=key)):
                read = isinstance(node.ctx, ast.Load)
            case ast.Call(
                func=ast.Attribute(value=place, attr="get" | "pop"),
                args=[ast.Constant(value=key), *_],
            ):
                read = True
            case _:
                continue
        if read and key in BLOCKS and name_of(place) in CONFIGS:
            yield node.lineno


def name_of(place: ast.expr) -> str:
    """`x`, `a.x` and `x()` by their last name."""
    match place:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=called):
            return name_of(called)
    return ""


def modules() -> list[Path]:
    found = (ROOT / "launch").rglob("*.py")
    return [file for file in found if not READERS & set(file.parts)]


def test_nobody_else_reads_the_json_raw() -> None:
    found = {
        f"{file.relative_to(ROOT)}:{line}"
        for file in modules()
        for line in raw_reads(file.read_text())
    }
    assert found == set()


def test_a_raw_read_is_seen() -> None:
    source = """
stage = ds_config["zero_optimization"]["stage"]
low = config.get("bf16", {}).get("enabled")
kind = plan.ds_config["optimizer"]
resolve(recipe, layout)["bf16"]
config.pop("scheduler")
config["pipeline"] = {}
coordinates["pipeline"]
"""
    assert sorted(raw_reads(source)) == [2, 3, 4, 5, 6]
