"""Each workaround says what is wrong, in which versions, and which proof shows it; all proofs are named."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.paths import ROOT

HERE = Path(__file__).parent
MODULES = sorted(
    file
    for file in (ROOT / "launch/deepspeed_patches").glob("[!_]*.py")
    if file.stem != "versions"  # which releases they were tested with
)
PARTS = ("Defect:", "Versions:", "Workaround:", "Proof:")


def workarounds(module: Path) -> Iterator[tuple[str, str]]:
    """Name and docstring of each function that says of a defect."""
    for node in ast.parse(module.read_text()).body:
        text = ast.get_docstring(node) or "" if isinstance(node, ast.FunctionDef) else ""
        if isinstance(node, ast.FunctionDef) and "Defect:" in text:
            yield node.name, text


def proofs(text: str) -> set[tuple[str, str]]:
    return set(re.findall(r"(test_\w+\.py)::(test_\w+)", text))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
def test_each_workaround_is_described_and_proven(module: Path) -> None:
    found = dict(workarounds(module))
    assert found, f"{module.name} holds no workaround"
    for name, text in found.items():
        assert all(part in text for part in PARTS), name
        assert proofs(text), f"{name} names no proof"
        for file, test in proofs(text):
            assert f"def {test}(" in (HERE / file).read_text(), f"{name}: no {file}::{test}"
        assert f"`{module.stem}.{name}`" in (ROOT / "CONTRIBUTING.md").read_text(), name


def test_each_proof_is_named_by_what_it_proves() -> None:
    named = {
        proof for module in MODULES for _, text in workarounds(module) for proof in proofs(text)
    }
    for file in HERE.glob("test_*.py"):
        if file.name in (Path(__file__).name, "test_rejected.py"):
            continue
        for test in re.findall(r"^def (test_\w+)", file.read_text(), re.M):
            assert (file.name, test) in named
