"""A model of transformers becomes ours, and ours becomes one of transformers, with equal logits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from launch.config.schema import GPTModel
from launch.data.tokenizer import ByteTokenizer
from launch.hf.export import consolidate, export
from launch.hf.import_model import import_model
from launch.hf.initial_weights import load_initial_weights
from launch.hf.read_weights import weights_of
from models.gpt import GPT
from tests.hf.peers import PEERS, logits, saved_peer
from tests.hf.runs import finished_run

BOUND = 1e-5


def imported(source: Path, out: Path, **options: Any) -> GPT:
    """Import a folder, and build our model as `model.yaml` says, with the weights it names."""
    import_model(str(source), out, **options)
    spec = GPTModel(**yaml.safe_load((out / "model.yaml").read_text())["model"])
    model = GPT(spec.shape).eval()
    load_initial_weights(model.named_parameters(), spec)
    return model


def as_run(folder: Path, source: Path) -> Path:
    """A finished run folder with the imported weights of a model, named by transformers."""
    out = folder / "imported"
    import_model(str(source), out)
    return finished_run(folder / "run", _model(out), out)


@pytest.mark.parametrize("name", PEERS)
def test_logits_are_transformers_own_both_ways(name: str, tmp_path: Path) -> None:
    theirs = saved_peer(PEERS[name], tmp_path / "theirs")
    expected = logits(theirs)
    assert expected.std() > 0.1
    ours = imported(tmp_path / "theirs", tmp_path / "imported")
    assert (logits(ours) - expected).abs().max() < BOUND

    run = finished_run(tmp_path / "run", _model(tmp_path / "imported"), tmp_path / "imported")
    export(weights_of(run), tmp_path / "back", model_type=PEERS[name]["model_type"])
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)
    opened = type(theirs).from_pretrained(tmp_path / "back").eval()
    assert logits(opened).equal(expected)


def _model(imported: Path) -> dict[str, Any]:
    model: dict[str, Any] = yaml.safe_load((imported / "model.yaml").read_text())["model"]
    return model


SCRIPT = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = torch.arange(3, 27)[None]
    with torch.no_grad():
        logits = model(tokens).logits[0]
    new = model.generate(tokens, max_new_tokens=3, do_sample=False)
    print(json.dumps({
        "logits": logits.tolist(), "dtype": str(model.dtype),
        "ids": tokenizer("naïve\\tcafé <|endoftext|>")["input_ids"],
        "end": model.generation_config.eos_token_id, "length": new.shape[1],
        "ours": sorted({"launch", "models"} & sys.modules.keys()),
    }))
"""


def our_run(folder: Path, size: str, position: str) -> tuple[Path, Tensor]:
    """A finished run of a model of ours with random biases and norms; and its logits."""
    values = {
        "size": size, "position": position, "layers": 2, "hidden": 64, "vocab": 301, "context": 64,
    }  # fmt: skip
    torch.manual_seed(1)
    model = GPT(GPTModel.model_validate(values).shape).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(center + 0.1 * torch.randn(parameter.shape))
        expected: Tensor = model(torch.arange(3, 27)[None])[0]
    return finished_run(folder, values, dict(model.named_parameters())), expected


def test_a_process_without_our_code_opens_the_folders(tmp_path: Path) -> None:
    """Decoders of ours, among them that of the tiny recipes, in several files."""
    folders, expected = [], []
    for size, position in (("tiny", "learned"), ("tiny", "rope"), ("tiny_llama", "rope")):
        name = f"{size}_{position}"
        run, logits_of_ours = our_run(tmp_path / "runs" / name, size, position)
        folders.append(tmp_path / name)
        expected.append(logits_of_ours)
        export(weights_of(run), folders[-1], license_id="apache-2.0", shard_bytes=100_000)
        assert len(list(folders[-1].glob("model-*.safetensors"))) > 2
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *folders],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for found, ours in zip(lines, expected, strict=True):
        assert (torch.tensor(found.pop("logits")) - ours).abs().max() < BOUND
        assert found == {
            "dtype": "torch.float32", "end": 256, "length": 27, "ours": [],
            "ids": ByteTokenizer().encode("naïve\tcafé <|endoftext|>"),
        }  # fmt: skip
    card = (folders[0] / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card.split("---\n")[1]
    assert "| 2 | 4.5000 | 4.7500 |" in card
    assert "global_batch_size: 8" in card


def test_another_dtype_and_one_file(tmp_path: Path) -> None:
    saved_peer(PEERS["llama"], tmp_path / "theirs")
    run = as_run(tmp_path, tmp_path / "theirs")
    weights = weights_of(run)
    export(weights, tmp_path / "bf16", torch.bfloat16)
    found = load_file(tmp_path / "bf16" / "model.safetensors")
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    assert all(found[name].equal(tensor.bfloat16()) for name, tensor in before.items())
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"

    consolidate(weights, tmp_path / "one.safetensors", torch.float32)
    one, imported = (
        load_file(tmp_path / file) for file in ("one.safetensors", "imported/model.safetensors")
    )
    assert one.keys() == imported.keys()
    assert all(one[name].equal(tensor) for name, tensor in imported.items())


def test_files_of_a_model_in_parts_keep_their_dtype(tmp_path: Path) -> None:
    theirs = saved_peer(PEERS["qwen3, tied"], tmp_path / "theirs")
    whole = load_file(tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    theirs.bfloat16().save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours = imported(tmp_path / "theirs", tmp_path / "imported", shard_bytes=50_000)
    assert (tmp_path / "imported" / "model.safetensors.index.json").is_file()
    found = {
        name: tensor
        for file in (tmp_path / "imported").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    assert found["embedding.token.weight"].equal(whole["model.embed_tokens.weight"].bfloat16())
    assert len(found) == len(dict(ours.named_parameters()))


def test_old_names_and_constants_of_gpt2_are_understood(tmp_path: Path) -> None:
    """As on the Hub: no prefix, the causal mask in the file, and a copy of the tied head."""
    theirs = saved_peer(PEERS["gpt2"], tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, file)
    ours = imported(tmp_path / "theirs", tmp_path / "imported")
    assert (logits(ours) - logits(theirs)).abs().max() < BOUND


def test_a_run_of_family_hf_is_exported_as_it_is(tmp_path: Path) -> None:
    theirs = saved_peer(PEERS["qwen3, tied"] | {"use_sliding_window": False}, tmp_path / "theirs")
    run = finished_run(
        tmp_path / "run",
        {"family": "hf", "path": str(tmp_path / "theirs")},
        {name: p.detach() for name, p in theirs.named_parameters()},
    )
    export(weights_of(run), tmp_path / "out", torch.float32)
    opened = type(theirs).from_pretrained(tmp_path / "out").eval()
    assert logits(opened).equal(logits(theirs))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("é")["input_ids"] == [0xC3, 0xA9]
