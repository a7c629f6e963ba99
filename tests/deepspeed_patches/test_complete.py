"""Every workaround says what is wrong, and has a proof; every proof is of a workaround or of a rule."""

import ast
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from launch.paths import ROOT

PACKAGE = ROOT / "launch" / "deepspeed_patches"
PROOFS = Path(__file__).parent
NO_WORKAROUNDS = ("__init__", "versions", "apply")
PARTS = ("Defect", "Versions", "Workaround", "Proof")


def functions(file: Path) -> dict[str, ast.FunctionDef]:
    """The public functions at the top of a file."""
    body = ast.parse(file.read_text()).body
    return {
        node.name: node
        for node in body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }


def said(docstring: str) -> dict[str, str]:
    """The parts of a workaround's docstring by their names; each goes on in indented lines."""
    found = re.findall(r"^(\w+): (.*(?:\n    .*)*)", docstring, flags=re.MULTILINE)
    return {name: text for name, text in found if name in PARTS}


WORKAROUNDS = {
    f"{file.relative_to(PACKAGE).with_suffix('').as_posix()}.{name}": ast.get_docstring(node) or ""
    for file in sorted(PACKAGE.rglob("*.py"))
    if file.stem not in NO_WORKAROUNDS
    for name, node in functions(file).items()
}
TESTS = {
    f"{file.name}::{name}": ast.unparse(node)
    for file in sorted(PROOFS.glob("test_*.py"))
    if file.name != Path(__file__).name
    for name, node in functions(file).items()
    if name.startswith("test_")
}


@pytest.mark.parametrize("workaround", WORKAROUNDS)
def test_a_workaround_says_what_it_is_for_and_has_a_proof(workaround: str) -> None:
    docstring = WORKAROUNDS[workaround]
    if part := re.search(r"Part of the\s+workaround `(\w+)`", docstring):
        whole = f"{workaround.partition('.')[0]}.{part[1]}"
        assert said(WORKAROUNDS[whole]), f"{whole} is no workaround"
        return
    parts = said(docstring)
    assert tuple(parts) == PARTS
    assert f"DeepSpeed {version('deepspeed')}" in parts["Versions"]
    proofs = re.findall(r"\w+\.py::\w+", parts["Proof"])
    assert proofs
    for proof in proofs:
        assert f"repaired('{workaround}')" in TESTS[proof]


@pytest.mark.parametrize("test", TESTS)
def test_a_proof_is_named_where_its_workaround_or_rule_is(test: str) -> None:
    rules = (ROOT / "launch" / "config" / "compatibility.py").read_text()
    assert any(test in text for text in (*WORKAROUNDS.values(), rules))
