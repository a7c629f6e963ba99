"""Tokenizers both ways: the ids do not change, and recipes can use what came with a model."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, PretrainedConfig

from launch.data.tokenizer import load_tokenizer
from launch.errors import UserError
from launch.hf.import_model import import_model
from launch.hf.tokenizer_files import export_tokenizer, import_tokenizer
from tests.hf.peers import PEERS, saved_peer

TEXT = "Ünder the  bridge,\n\t12 times\r\nit's <|endoftext|> über\x00\x7f 中文 😀"


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A small BPE whose splitting is no model's: it cuts at digits, and nowhere else."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(["under the bridge, it's the ridge " * 20], trainer)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("config", [GPT2Config(), LlamaConfig()], ids=["gpt2", "llama"])
@pytest.mark.parametrize(
    "settings", [None, {"tokenizer_class": "GPT2Tokenizer"}], ids=["", "class"]
)
def test_a_file_keeps_its_ids(
    config: PretrainedConfig, settings: dict[str, Any] | None, trained: Path, tmp_path: Path
) -> None:
    """Also where the class that is named would split texts in another way."""
    if settings:
        settings = settings | {"eos_token": "<|endoftext|>"}
        (trained / "tokenizer_config.json").write_text(json.dumps(settings))
    out = tmp_path / "out"
    config.save_pretrained(out)
    export_tokenizer(str(trained), out, 64)
    ours, theirs = load_tokenizer(str(trained)), AutoTokenizer.from_pretrained(out)
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == ours.encode(TEXT)
    assert theirs.eos_token_id == ours.separator == 1


def test_bytes_keep_their_ids(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    export_tokenizer("bytes", tmp_path, 64)
    ours, theirs = load_tokenizer("bytes"), AutoTokenizer.from_pretrained(tmp_path)
    every = "".join(map(chr, (*range(0x800), *range(0xE000, 0xE100), 0x10FFFF))) + TEXT
    theirs.model_max_length = 10**9
    assert theirs(every)["input_ids"] == ours.encode(every)
    assert theirs.decode(ours.encode(TEXT)) == TEXT
    assert (theirs.eos_token_id, len(theirs)) == (ours.separator, ours.vocab_size)


def test_an_imported_tokenizer_is_one_for_recipes(trained: Path, tmp_path: Path) -> None:
    """Also from the older files, without a tokenizer.json."""
    new, old = tmp_path / "new", tmp_path / "old"
    new.mkdir()
    assert import_tokenizer(trained, new)
    assert load_tokenizer(str(new)).encode(TEXT) == load_tokenizer(str(trained)).encode(TEXT)

    model = json.loads((trained / "tokenizer.json").read_text())["model"]
    files = tmp_path / "files"
    files.mkdir()
    (files / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (files / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    GPT2Config().save_pretrained(files)
    old.mkdir()
    assert import_tokenizer(files, old)
    gpt2 = AutoTokenizer.from_pretrained(files)
    assert load_tokenizer(str(old)).encode(TEXT) == gpt2(TEXT)["input_ids"]


def test_a_hub_name_is_downloaded_without_pickles_and_code(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_peer(PEERS["gpt2"], trained)
    (trained / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    asked: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == "someone/model"
        asked.extend(allow_patterns)
        return str(trained)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    said = import_model("someone/model", tmp_path / "out")
    assert said.endswith(f"data: {{tokenizer: {tmp_path / 'out'}}}")
    assert "model*.safetensors*" in asked
    assert not [p for p in asked if p.endswith((".bin", ".py", ".pt", ".pkl", "*"))][1:]
    origin = json.loads((tmp_path / "out" / "origin.json").read_text())
    assert origin == {"name": "someone/model", "license": "mit"}


def test_a_name_that_the_hub_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="no folder is called 'nobody/nothing', and the Hub does not"
    ):
        import_model("nobody/nothing", tmp_path / "out")
    with pytest.raises(UserError, match="there is no such folder"):
        import_model(str(tmp_path / "nothing"), tmp_path / "out")
