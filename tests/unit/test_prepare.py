import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from launch.config.load import recipe_from_dict
from launch.config.schema import Data
from launch.data import prepare as module
from launch.data.prepare import Corpus, prepare, tokens_needed
from launch.data.token_file import TokenFile
from launch.errors import UserError
from launch.ops import builder as op_builder
from launch.paths import ROOT
from launch.runtime.run_dir import RunDir, lock_run_dir
from tests.unit.test_tokenizer import train_tokenizer

CHILD = """
import os, signal, sys
import launch.data.token_file
from launch.data.prepare import prepare
from launch.config.schema import Data
source, cache, kill_after = sys.argv[1], sys.argv[2], int(sys.argv[3])
add = launch.data.token_file.SplitWriter.add
count = 0
def counted(self, key, ids):
    global count
    count += 1
    if count == kill_after:
        self.train.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, key, ids)
launch.data.token_file.SplitWriter.add = counted
corpus = prepare(Data(source=source, sequence_length=8, cache_dir=cache), tokens_needed=1)
print(corpus.folder, len(corpus.train), len(corpus.held_out), corpus.train._tokens.sum(dtype='uint64'))
"""


def start(source: str, cache: Path, kill_after: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, source, str(cache), str(kill_after)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def make(tmp_path: Path, source: str | list[str], needed: int = 1, **settings: Any) -> Corpus:
    values: dict[str, Any] = {"sequence_length": 4, "cache_dir": str(tmp_path / "cache")}
    values |= settings
    data = Data(source=source, **values)
    return prepare(data, tokens_needed=needed, say=lambda line: None)


def write_rows(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def all_ids(tokens: TokenFile) -> list[int]:
    return list(map(int, np.fromfile(tokens.path, dtype=tokens._tokens.dtype)))


def texts_in(tokens: TokenFile) -> list[str]:
    *texts, end = "".join(chr(i) for i in all_ids(tokens)).split(chr(256))
    assert end == ""  # a separator is last
    return texts


def test_a_local_tokenizer(tmp_path: Path) -> None:
    train_tokenizer(tmp_path / "tokenizer.json", ["<|endoftext|>"])
    texts = ["def f(x):", "    return x", "x = f(x)"]
    source = write_rows(tmp_path / "x.jsonl", texts)
    corpus = make(tmp_path, source, tokenizer=str(tmp_path / "tokenizer.json"))
    ids = all_ids(corpus.train) + all_ids(corpus.held_out)
    assert ids.count(corpus.tokenizer.separator) == 3
    assert sorted(corpus.tokenizer.decode(ids)) == sorted("".join(texts))
    assert len(ids) < len("".join(texts))


def test_text_is_tokenised_once_and_again_when_something_changes(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    source = write_rows(path, ["one", "two"])
    train_tokenizer(tmp_path / "tokenizer.json", ["</s>", "<end>"])
    tokenizer = str(tmp_path / "tokenizer.json")
    said: list[str] = []

    def folder(needed: int = 1, **settings: Any) -> Path:
        values: dict[str, Any] = {"sequence_length": 4, "cache_dir": str(tmp_path / "cache")}
        values |= settings
        return prepare(Data(source=source, **values), tokens_needed=needed, say=said.append).folder

    first = folder()
    assert (len(said), "tokenised 2 documents" in said[0]) == (1, True)
    assert folder() == folder(sequence_length=8) == folder(needed=99) == first
    assert len(said) == 1
    different = [
        first,
        folder(held_out=0.5),
        folder(tokenizer=tokenizer),
        folder(streaming=True, needed=3),
        folder(streaming=True, needed=4),
    ]
    train_tokenizer(tmp_path / "tokenizer.json", ["</s>", "<end>", "<new>"])
    different.append(folder(tokenizer=tokenizer))
    os.utime(path, ns=(1, 1))
    different.append(folder())
    write_rows(path, ["one", "two", "three"])
    os.utime(path, ns=(1, 1))
    different.append(folder())
    assert len(set(different)) == len(different)
    assert len(said) == len(different)


def test_the_standard_library(tmp_path: Path) -> None:
    corpus = make(tmp_path, "python-stdlib")
    assert len(corpus.train) > 3_000_000
    assert 0.001 < len(corpus.held_out) / len(corpus.train) < 0.1
    assert len(corpus.train) + len(corpus.held_out) == corpus.text_bytes + corpus.documents
    text = corpus.tokenizer.decode(all_ids(corpus.held_out))
    assert "import " in text


def test_processes_that_start_at_once_build_once_and_agree(tmp_path: Path) -> None:
    children = [start("python-stdlib", tmp_path / "cache") for _ in range(3)]
    outputs = [child.communicate(timeout=600)[0].splitlines() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len({output[-1] for output in outputs}) == 1
    lines = [line for output in outputs for line in output]
    assert sum("tokenised" in line for line in lines) == 1
    assert sum("damaged" in line for line in lines) == 0


def test_a_killed_builder_leaves_nothing_that_misleads(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "x.jsonl", [f"text {i}" for i in range(100)])
    cache = tmp_path / "cache"
    killed = start(source, cache, kill_after=50)
    killed.communicate(timeout=600)
    assert killed.returncode == -9
    (building,) = cache.glob("*.building")
    assert (building / "train.bin").stat().st_size > 0
    (building / "stray").touch()
    said: list[str] = []
    data = Data(source=source, sequence_length=8, cache_dir=str(cache))
    corpus = prepare(data, tokens_needed=1, say=said.append)
    assert len(texts_in(corpus.train)) + len(texts_in(corpus.held_out)) == 100
    assert not building.exists()
    assert not (corpus.folder / "stray").exists()
    assert len(said) == 1


@pytest.mark.parametrize("name", ["train.bin", "held_out.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, name: str, damage: str) -> None:
    source = write_rows(tmp_path / "x.jsonl", [f"text {i}" for i in range(20)])
    data = Data(source=source, sequence_length=8, cache_dir=str(tmp_path / "cache"))
    said: list[str] = []
    corpus = prepare(data, tokens_needed=1, say=said.append)
    good = {path.name: path.read_bytes() for path in corpus.folder.iterdir()}
    path = corpus.folder / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.unlink()
    assert prepare(data, tokens_needed=1, say=said.append).folder == corpus.folder
    assert {path.name: path.read_bytes() for path in corpus.folder.iterdir()} == good
    assert "is damaged: tokenising again" in said[1]


def test_a_complete_cache_is_used_without_writing(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "x.jsonl", ["a", "b"])
    corpus = make(tmp_path, source)
    lock = corpus.folder.with_suffix(".lock")
    lock.unlink()
    assert make(tmp_path, source).folder == corpus.folder
    assert not lock.exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "x.jsonl", ["a" * 100_000, "b" * 100_000])
    with monkeypatch.context() as patch:
        patch.setattr(module, "TRAIN", "/dev/full")  # a device on which each write finds no space
        with pytest.raises(UserError, match=r"data\.cache_dir: no space left .*free some"):
            make(tmp_path, source)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    make(tmp_path, source)


def test_a_failed_source_leaves_nothing(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "x.jsonl", ["a", "b"])
    with Path(source).open("a") as file:
        file.write("{\n")
    with pytest.raises(UserError, match="line 3 is no JSON"):
        make(tmp_path, source)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_cache_folder_that_is_a_file_is_rejected(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "x.jsonl", ["a", "b"])
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot use .*cache"):
        make(tmp_path, source)


def test_a_source_without_text_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no text in"):
        make(tmp_path, write_rows(tmp_path / "x.jsonl", ["", ""]))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="there is no text in"):
        make(tmp_path, str(tmp_path / "empty.txt"))


def test_tokens_needed_fill_every_step_once() -> None:
    values = {
        "name": "x",
        "model": {"size": "tiny"},
        "data": {"sequence_length": 16},
        "train": {"steps": 3, "global_batch_size": 4, "micro_batch_size": 2},
        "deepspeed": {"config": "ds_configs/zero1.json"},
    }
    assert tokens_needed(recipe_from_dict(values)) == 3 * 4 * 16 + 1


def test_prepare_data_prints_what_there_is(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "x.jsonl", [f"text {i:03}" for i in range(50)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {size: tiny}\ndata: {sequence_length: 16}\n"
        "train: {steps: 1, global_batch_size: 2, micro_batch_size: 2}\n"
        "deepspeed: {config: ds_configs/zero1.json}\n"
    )
    script = [sys.executable, "scripts/prepare_data.py", "--config", str(recipe), "--set"]
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    done = subprocess.run(
        [*script, f"data.source={source}", cache], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert ["documents", "50"] in [line.split() for line in done.stdout.splitlines()]
    assert f"bytes per token  {8 / 9:.2f}" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["cache", str(folder)]
    wrong = subprocess.run(
        [*script, "data.source=none.txt", cache], cwd=ROOT, capture_output=True, text=True
    )
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert wrong.stderr.startswith("error: data.source: there is no file")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()]
)
def test_a_disk_without_locks_is_told(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(*_: object, **__: object) -> None:
        raise error

    (tmp_path / "a.txt").write_text("words and words")
    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.raises(UserError, match=r"data.cache_dir: the disk of .* has no file locks"):
        make(tmp_path, str(tmp_path / "a.txt"))
    folder = RunDir(tmp_path / "run")
    with pytest.raises(UserError, match=r"run.dir: cannot write to .*, or lock it \("):
        lock_run_dir(folder)
    with (
        pytest.raises(UserError, match="TORCH_EXTENSIONS_DIR"),
        op_builder._locked(tmp_path / "op"),
    ):
        pass
