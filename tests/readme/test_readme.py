"""No command in the documentation may rot: each is taken out of it and tried, or its flags are."""

import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from launch import train
from launch.config.load import load_recipe
from launch.paths import ROOT
from launch.planner.dry_run import header, print_dry_run
from tests.cli.commands import run_forked
from tests.recipes.headers import header_ranks
from tests.recipes.shrink import tiny_hub_model, without_hub

DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CERTIFICATE.md",
    "DEEPSPEED_VERSIONS.md",
    "recipes/README.md",
    "recipes/BENCHMARKS.md",
    "recipes/SPEED.md",
    "ds_configs/README.md",
    "models/README.md",
    "launch/README.md",
    *sorted(
        f"launch/cluster/backends/{page.name}"
        for page in (ROOT / "launch/cluster/backends").glob("*.md")
    ),
)
SCRIPTS = sorted((ROOT / "scripts").glob("[!_]*.py"))
# Commands of other people's programs, which are not ours to check.
FOREIGN = {
    "accelerate", "apt-get", "cat", "cd", "docker", "export", "git", "grep", "hf", "kubectl", "ls",
    "pip", "sacct", "sbatch", "scancel", "scontrol", "sinfo", "sky", "squeue", "ssh", "ssh-copy-id",
    "ssh-keyscan", "sudo", "tail", "tensorboard", "touch",
}  # fmt: skip
RANK_FLAGS = {"--num_gpus", "--nproc_per_node", "--nproc-per-node", "--num_processes"}


def logical_lines(text: str) -> Iterator[str]:
    """Lines without comments and prompts, those that end in a backslash joined to the next."""
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip().removeprefix("$ ")
        if line and not line.startswith("#"):
            yield line


def commands_of(document: str) -> Iterator[list[str]]:
    text = (ROOT / document).read_text()
    for block in re.findall(r"^ *```(?:bash|sh|shell|console)\n(.*?)^ *```", text, re.S | re.M):
        for line in logical_lines(block):
            # Several commands on a line, and variables set for one.
            for part in re.split(r"&&|;|\|", shlex.join(shlex.split(line, comments=True))):
                words = shlex.split(part.replace("'&&'", "&&"))
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words.pop(0)
                if words:
                    yield words


def all_commands() -> list[tuple[str, list[str]]]:
    found = []
    for document in DOCUMENTS:
        if (ROOT / document).is_file():
            found += [(document, words) for words in commands_of(document)]
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        lines = [line for line in header(file) if line.startswith("deepspeed ")]
        found += [(f"recipes/{file.name}", shlex.split(line)) for line in lines]
    return found


COMMANDS = all_commands()


@pytest.fixture(scope="module")
def hub_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hub_model(tmp_path_factory.mktemp("hub") / "tiny-qwen3")


@functools.cache
def help_of(script: str) -> str:
    done = run_forked([ROOT / script, "--help"], {"COLUMNS": "160"})
    assert done.code == 0, done.output
    return done.output[done.output.index("usage: ") :]


def check_train(words: list[str], hub_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command with launch/train.py: its arguments parse, and what it would run is printed."""
    at = next(i for i, word in enumerate(words) if word.endswith("launch/train.py"))
    ranks = 1
    for flag, value in pairwise(words[:at]):
        if flag in RANK_FLAGS:
            ranks = int(value)
    monkeypatch.setattr(sys, "argv", words[at:])
    given = train.parse_arguments()
    if given.config:
        if "--hostfile" in words[:at]:
            ranks = header_ranks(ROOT / given.config)
        overrides = given.set + without_hub(load_recipe(given.config, given.set), hub_model)
        print_dry_run(load_recipe(given.config, overrides), given.ranks or ranks)


def check_script(words: list[str]) -> None:
    """A command with a script: it exists, answers --help, and knows each flag."""
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).is_file(), f"there is no {script}"
    known = help_of(script)
    for word in words[words.index(script) :]:
        if word.startswith("--"):
            flag = word.partition("=")[0]
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", known), f"{script} has no {flag}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_document_exists(document: str) -> None:
    assert (ROOT / document).is_file()


@pytest.mark.parametrize(
    ("document", "words"), COMMANDS, ids=[f"{d}: {shlex.join(w)[:90]}" for d, w in COMMANDS]
)
def test_each_command_works(
    document: str, words: list[str], hub_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    program = Path(words[0]).name
    for word in words:
        # Patterns such as recipes/*.yaml count as well.
        if re.match(r"(\./)?(recipes|ds_configs|scripts|launch|models|tests)/", word):
            assert list(ROOT.glob(word.removeprefix("./"))), f"{document}: there is no {word}"
    if any(word.endswith("launch/train.py") for word in words):
        check_train(words, hub_model, monkeypatch)
    elif program == "make":
        done = subprocess.run(
            ["make", "-n", *words[1:]], capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stderr
    elif program.startswith("python") and any(word.endswith(".py") for word in words):
        check_script(words)
    else:
        assert program in FOREIGN or words[1:2] == ["-m"], f"{document}: teach this test {words}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_script_explains_itself(script: Path) -> None:
    text = help_of(str(script.relative_to(ROOT)))
    assert text.startswith("usage: ")
    assert len(text.split()) > 15, "say what it does"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    file = ROOT / document
    for target in re.findall(r"\]\(([^)#\s]+)", file.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (file.parent / target).exists(), f"{document}: there is no {target}"
