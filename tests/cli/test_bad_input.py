"""A person's mistakes: one line that says what, where and what to do, and an exit code."""

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.paths import ROOT
from tests.cli.commands import (
    Ended,
    run,
    run_forked,
    train,
    train_command,
    train_forked,
    write_recipe,
)

CONFIG = "deepspeed.config"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that is in order."""
    return write_recipe(tmp_path_factory.mktemp("bad"))


def rejected(ended: Ended, *words: str) -> None:
    """The command must have rejected in one line that holds all of `words`."""
    line = ended.error()
    assert ended.code == 2, line
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in: {line}"


# What one override breaks, and what the line has to name.
OVERRIDES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown top-level key": (("modle.layers=2",), ("unknown key modle", "did you mean 'model'")),
    "unknown nested key": (
        ("train.step=4",),
        ("unknown key train.step", "did you mean 'steps'"),
    ),
    "wrong type": (("train.steps=many",), ("train.steps", "integer", "many")),
    "negative steps": (("train.steps=-3",), ("train.steps", "greater than 0", "-3")),
    "unknown size": (("model.size=124mm",), ("model.size", "'124mm'", "did you mean '124m'")),
    "heads": (("model.heads=5",), ("hidden 32", "heads 5")),
    "kv_heads": (("model.kv_heads=3",), ("heads 2", "kv_heads 3")),
    "no equals sign": (("train.steps",), ("--set train.steps", "key=value")),
    "sequence too long": (("data.sequence_length=64",), ("data.sequence_length", "64", "32")),
    "tensor parallel": (("parallel.tensor=3",), ("parallel.tensor", "use 1 or 2")),
    "ranks and stages": (("parallel.pipeline=2",), ("1 ranks", "start a multiple of 2 ranks")),
    "schedule": (("train.schedule.decay=cosinus",), ("train.schedule.decay", "cosine")),
    "compiled ZeRO-3": (
        (
            "deepspeed.zero_optimization.stage=3",
            "train.compile=true",
            "deepspeed.zero_optimization.memory_efficient_linear=true",
        ),
        ("memory_efficient_linear", "set it to false", "train.compile=false"),
    ),
    "missing JSON": (("deepspeed.config=ds_configs/zero11.json",), ("zero11.json", "zero1.json")),
    "no JSON named": (("deepspeed.config=null",), ("deepspeed.config", "ds_configs/zero1.json")),
    "batch size in the JSON": (
        ("deepspeed.train_batch_size=4",),
        ("deepspeed.train_batch_size", "train.global_batch_size"),
    ),
    "scheduler in the JSON": (
        ("deepspeed.scheduler.type=WarmupLR",),
        ("deepspeed.scheduler", "train.schedule"),
    ),
    "unknown JSON key": (
        ("deepspeed.zero_optimisation.stage=2",),
        ("zero_optimisation", "zero_optimization"),
    ),
    "unknown nested JSON key": (
        ("deepspeed.zero_optimization.overlap_com=true",),
        ("overlap_com", "overlap_comm"),
    ),
    "auto in the JSON": (("deepspeed.bf16.enabled=auto",), ("bf16.enabled", "auto")),
    "bf16 and fp16": (
        ("deepspeed.bf16.enabled=true", "deepspeed.fp16.enabled=true"),
        ("bf16", "fp16"),
    ),
    "missing data": (("data.source=/nowhere/text.txt",), ("data.source", "/nowhere/text.txt")),
    "no such tokenizer": (
        ("data.tokenizer=/nowhere/tokenizer.json",),
        ("data.tokenizer", "/nowhere/tokenizer.json"),
    ),
    "vocabulary too small": (
        ("model.vocab=100",),
        ("data.tokenizer", "257", "100", "model.vocab"),
    ),
    "too little text": (
        ("train.global_batch_size=40000", "train.micro_batch_size=1"),
        ("data.source", "40000", "train.global_batch_size"),
    ),
    "cache is a file": (("data.cache_dir=/dev/null",), ("data.cache_dir", "/dev/null")),
    "run.dir is a file": (("run.dir=/dev/null",), ("run.dir", "/dev/null", "writable")),
    "run.dir cannot be made": (("run.dir=/proc/run",), ("run.dir", "/proc/run", "writable")),
    "swap folder cannot be made": (
        (
            "deepspeed.config=ds_configs/zero3_offload_nvme.json",
            "deepspeed.zero_optimization.offload_optimizer.nvme_path=/proc/swap",
            "deepspeed.zero_optimization.offload_param.nvme_path=/proc/swap",
        ),
        ("nvme_path /proc/swap", "not writable", "offload_optimizer.nvme_path"),
    ),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_an_override_is_rejected(case: str, recipe: Path) -> None:
    sets, words = OVERRIDES[case]
    rejected(train_forked(recipe, *sets), *words)


def _text(text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        file = folder / "broken.yaml"
        file.write_text(text)
        return file

    return write


RECIPES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "no such recipe": (lambda _: Path("recipes/gpt_tiny_zero22.yaml"), ("no recipe file", "zero2")),
    "broken YAML": (_text("model: {layers: 2\ntrain:"), ("broken.yaml", "YAML")),
    "no mapping": (_text("- model\n- data\n"), ("broken.yaml", "mapping")),
    "a missing block": (
        _text("model: {size: tiny}\ndata: {sequence_length: 8}\ndeepspeed: {config: a.json}\n"),
        ("broken.yaml", "train is missing"),
    ),
    "sizes missing": (
        _text(
            "model: {layers: 2}\ndata: {sequence_length: 8}\ndeepspeed: {config: a.json}\n"
            "train: {steps: 1, global_batch_size: 1, micro_batch_size: 1}\n"
        ),
        ("give size, or all of", "hidden, heads, vocab, context"),
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_is_rejected(case: str, tmp_path: Path) -> None:
    write, words = RECIPES[case]
    rejected(train_forked(write(tmp_path)), *words)


GOOD_JSON = '{"optimizer": {"type": "AdamW", "params": {"lr": 0.001}}'
JSONS = {
    "broken": (GOOD_JSON, ("broken.json:1",)),
    "a comment": (f"{GOOD_JSON}\n// fast\n}}", ("broken.json:2", "comment")),
    "a trailing comma": (f"{GOOD_JSON},\n}}", ("broken.json", "comma")),
    "a key twice": (f'{GOOD_JSON}, "optimizer": {{}}}}', ("broken.json", "'optimizer'", "twice")),
    "no object": ("[1]", ("broken.json", "object")),
    "no optimizer": ("{}", ("broken.json", "optimizer")),
    "a removed feature": (f'{GOOD_JSON}, "amp": {{"enabled": true}}}}', ("amp",)),
}


@pytest.mark.parametrize("case", JSONS)
def test_a_json_is_rejected(case: str, recipe: Path, tmp_path: Path) -> None:
    text, words = JSONS[case]
    file = tmp_path / "broken.json"
    file.write_text(text)
    rejected(train_forked(recipe, f"{CONFIG}={file}"), *words)


TEXTS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "an empty folder": ("", None, ("data.source", "holds no", ".jsonl")),
    "an unknown suffix": ("a.docx", "text", ("a.docx", ".txt")),
    "a missing field": ("a.jsonl", '{"body": "x"}\n', ("a.jsonl", "text", "body")),
    "broken jsonl": ("a.jsonl", '{"text": "x"}\n{"text": \n', ("a.jsonl", "2")),
    "an empty text": ("a.txt", "", ("data.source", "no text")),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_is_rejected(case: str, recipe: Path, tmp_path: Path) -> None:
    name, text, words = TEXTS[case]
    folder = tmp_path / "corpus"
    folder.mkdir()
    if text is not None:
        (folder / name).write_text(text)
    rejected(train_forked(recipe, f"data.source={folder / name}"), *words)


def test_a_tracker_that_is_not_installed_is_rejected(recipe: Path, tmp_path: Path) -> None:
    _, entry, *words = train_command(recipe, "run.wandb=project")
    without = tmp_path / "without_wandb.py"  # also where it is installed
    without.write_text(
        "import runpy, sys\n"
        "sys.modules['wandb'] = None\n"
        f"runpy.run_path({str(entry)!r}, run_name='__main__')\n"
    )
    rejected(run_forked([without, *words]), "run.wandb", "pip install wandb")


@pytest.mark.parametrize(
    ("path", "changes", "words"),
    [
        ("/nowhere/model", "{}", ("model.path", "/nowhere/model")),
        ("FOLDER", "{n_layerz: 1}", ("n_layerz",)),
    ],
)
def test_a_transformers_model_is_rejected(
    path: str, changes: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    path = path.replace("FOLDER", str(tmp_path))
    recipe = write_recipe(tmp_path, f"{{family: hf, path: {path}, changes: {changes}}}")
    rejected(train_forked(recipe), *words)


def test_a_port_in_use_is_rejected(recipe: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        rejected(train_forked(recipe, ranks=2, port=port), str(port), "in use", "--master_port")


def test_a_missing_compiler_is_rejected(recipe: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    env = {"PATH": str(tools), "CXX": "", "TORCH_EXTENSIONS_DIR": str(tmp_path / "none")}
    _, *command = train_command(recipe, f"{CONFIG}=ds_configs/zero2_offload_cpu.json")
    rejected(run_forked(command, env), "cpu_adam", "compiler")


def test_a_folder_without_a_run_is_rejected(tmp_path: Path) -> None:
    command: list[str | Path] = [sys.executable, ROOT / "scripts/generate.py", tmp_path]
    rejected(run(command), str(tmp_path), "run folder")


def test_ranks_that_do_not_divide_the_batch_are_rejected_once(recipe: Path) -> None:
    sets = ["train.global_batch_size=7", "train.micro_batch_size=1"]
    ended = train_forked(recipe, *sets, ranks=2)
    rejected(ended, "train.global_batch_size", "7", "2")


@pytest.mark.parametrize("start", [train_forked, pytest.param(train, marks=pytest.mark.matrix)])
def test_what_every_rank_finds_is_told_once(start: Callable[..., Ended], recipe: Path) -> None:
    rejected(start(recipe, "data.tokenizer=/nowhere", ranks=2), "data.tokenizer", "/nowhere")
