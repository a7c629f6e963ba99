"""Imports run one way: scripts -> launch -> models. And what needs no framework imports none."""

import ast
import re
import subprocess
import sys
from functools import cache

import pytest

from launch.paths import ROOT

MAY_IMPORT = {
    "models": {"models"},
    "launch": {"launch", "models"},
    "scripts": {"launch", "models"},
    "tests": {"tests", "launch", "models", "scripts"},
}
FILES = sorted(file for folder in MAY_IMPORT for file in (ROOT / folder).rglob("*.py"))


@cache
def import_statements(source: str) -> list[ast.Import | ast.ImportFrom]:
    """All of a file's, also those inside functions."""
    nodes = ast.walk(ast.parse(source))
    return [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]


def imported(source: str) -> set[str]:
    """The top-level packages that a file imports anywhere in it, also inside functions."""
    found = set()
    for node in import_statements(source):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        else:
            assert node.level == 0, "relative imports hide where a name comes from"
            found.add(str(node.module).split(".")[0])
    return found


def test_imports_run_one_way() -> None:
    for file in FILES:
        name = str(file.relative_to(ROOT))
        folder, source = file.relative_to(ROOT).parts[0], file.read_text()
        found = imported(source)
        assert found & MAY_IMPORT.keys() <= MAY_IMPORT[folder], name
        if folder == "models":
            # The pipeline is DeepSpeed's; the layers and their cuts are anyone's.
            own = file.stem in ("pipeline", "pipeline_schedules")
            assert "deepspeed" not in found or own, name
        if file.is_relative_to(ROOT / "models" / "parallel"):
            # Copyable as a folder: it knows neither the model nor anything else of the project.
            assert "from models" not in source.replace("from models.parallel.", ""), name


# The packages of launch/ by floor: a package may import what lies on a lower line, and never its own.
FLOORS = (
    ("errors", "paths"),
    ("ds_json",),
    ("deepspeed_patches",),
    ("config",),
    ("runtime",),
    ("ops",),
    ("data", "checkpoint", "versions", "memory"),
    ("hf",),
    ("training",),
    ("planner", "parity"),
    ("perf", "doctor", "certify"),
    ("cluster",),
    ("train",),
)
FLOOR_OF = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}


def packages_imported(source: str, package: str) -> set[str]:
    """The other packages (or modules) of launch/ that a file of `package` imports anywhere in it."""
    found = set()
    for node in import_statements(source):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        parts = [module.split(".") for module in modules]
        found |= {part[1] for part in parts if part[0] == "launch" and len(part) > 1}
    return found - {package}


def test_packages_of_launch_import_only_lower_floors() -> None:
    for file in (file for file in FILES if file.is_relative_to(ROOT / "launch")):
        package = file.relative_to(ROOT / "launch").with_suffix("").parts[0]
        others = packages_imported(file.read_text(), package)
        if package == "__init__":
            assert not others
            continue
        for other in others:
            assert FLOOR_OF[other] < FLOOR_OF[package], f"{file} imports {other}"


def test_every_package_of_launch_has_a_floor_and_says_what_it_holds() -> None:
    folders = {f.parent.name for f in (ROOT / "launch").glob("*/*.py")}
    files = {f.stem for f in (ROOT / "launch").glob("*.py")} - {"__init__"}
    assert folders | files == FLOOR_OF.keys()
    for folder in folders:
        says = ast.get_docstring(ast.parse((ROOT / "launch" / folder / "__init__.py").read_text()))
        assert says and "May import" in says


def test_the_floors_see_an_import_of_either_form() -> None:
    assert packages_imported("import launch.perf.levers", "data") == {"perf"}
    assert packages_imported("def f():\n    from launch import train\n", "data") == {"train"}
    assert packages_imported("from launch.data.batches import Batches\n", "data") == set()


def test_the_check_sees_every_kind_of_import() -> None:
    hidden = "def f():\n    import scripts.plan as p\n    from tests.ranks import run_ranks\n"
    assert imported(hidden) == {"scripts", "tests"}
    with pytest.raises(AssertionError, match="relative"):
        imported("from . import engine")


@pytest.mark.parametrize(
    "module",
    ["models.config", "models.pipeline_stages", "launch.config.load", "launch.config.resolve"],
)
def test_planning_needs_no_framework(module: str) -> None:
    heavy = ("torch", "deepspeed", "transformers", "datasets", "matplotlib")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("folder", ["launch", "scripts"])
def test_no_file_hides_a_library(folder: str) -> None:
    """`python launch/train.py` puts launch/ on the path, where datasets.py would hide the library."""
    used = set().union(*(imported(file.read_text()) for file in FILES)) | set(
        sys.stdlib_module_names
    )
    names = {file.stem for file in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert not names & (used - MAY_IMPORT.keys())


# Text that names a module or a file: strings, comments, templates, pages. A changelog tells old names too.
TEXTS = [
    *FILES,
    *(f for f in ROOT.glob("*.md") if f.name != "CHANGELOG.md"),
    *(f for top in ("launch", "models", "recipes", "ds_configs") for f in (ROOT / top).rglob("*.md")),
    *(ROOT / "launch").rglob("*.j2"),
]  # fmt: skip


def names_of_nothing(text: str) -> list[str]:
    """Paths and dotted modules of launch/ and models/ that a text names and that do not exist."""
    paths = re.findall(r"\b(?:launch|models)/[\w/]+\.(?:py|md|j2|yaml)\b", text)
    missing = [path for path in paths if not (ROOT / path).is_file()]
    for name in re.findall(r"(?<![\w./-])(?:launch|models)(?:\.[a-z_0-9]+)+\b", text):
        place = ROOT
        for part in name.split("."):
            place = place / part
            if place.with_suffix(".py").is_file():
                break  # what follows is a name inside the module
            if not place.is_dir():
                missing.append(name)
                break
    return missing


def test_modules_and_files_that_texts_name_exist() -> None:
    for file in TEXTS:
        missing = set(names_of_nothing(file.read_text()))
        # The launcher's own file; and the names that the test below makes up.
        assert missing <= {"launch.py", "launch.old.thing", "models/old.py"}, file


def test_the_check_sees_a_name_of_nothing() -> None:
    assert names_of_nothing("python -m launch.old.thing and models/old.py") == [
        "models/old.py",
        "launch.old.thing",
    ]
    assert names_of_nothing("launch.config.load.load_recipe, models/gpt.py") == []
