"""What is not supported is rejected by name, and leaves nothing behind; no file runs code."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.data.tokenizer import HubTokenizer
from launch.errors import UserError
from launch.hf.export import consolidate, export
from launch.hf.import_model import import_model
from launch.hf.read_weights import weights_of
from models.config import GPTConfig
from models.gpt import GPT
from models.hf import from_pretrained, read_config
from tests.hf.peers import PEERS, saved_peer
from tests.hf.runs import finished_run


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model of each `model_type`."""
    folder = tmp_path_factory.mktemp("saved")
    for name in ("gpt2", "llama", "qwen3, tied", "mistral", "gpt_neox"):
        saved_peer(PEERS[name], folder / name.split(",")[0])
    return folder


FIELDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "rope scaling": (
        "llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.factor",
    ),
    "yarn, in the newer form": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        "rope_parameters.factor",
    ),
    "a part of each head": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "biases of attention alone": ("llama", {"attention_bias": True}, "mlp_bias is False"),
    "attention dropout": ("llama", {"attention_dropout": 0.1}, "attention_dropout"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "quantized": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "a field of the future": ("llama", {"logit_softcap": 30.0}, "logit_softcap is 30.0"),
    "code of its own": ("llama", {"auto_map": {"AutoConfig": "code.Config"}}, "auto_map asks for code"),
    "another head": (
        "llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures",
    ),
    "sizes that contradict": ("llama", {"num_key_value_heads": 3}, "not a usable configuration"),
    "a type that is no number": ("llama", {"hidden_size": "48"}, "not a usable configuration"),
    "a short window": ("mistral", {"sliding_window": 16}, "sliding_window is 16"),
    "windows on some layers": (
        "qwen3",
        {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
        "layer_types",
    ),
    "biases": ("qwen3", {"attention_bias": True}, "attention_bias is True"),
    "scores by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx"),
    "unscaled scores": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    "relu": ("gpt2", {"activation_function": "relu"}, "activation_function"),
    "dropouts that differ": ("gpt2", {"attn_pdrop": 0.0}, "embd_pdrop|attn_pdrop"),
    "another model": ("gpt2", {"model_type": "bloom"}, "model_type 'bloom' is not one"),
    "parallel residual": (
        "gpt_neox", {"use_parallel_residual": True}, "use_parallel_residual is True",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_a_field_that_we_do_not_compute_is_named(case: str, saved: Path, tmp_path: Path) -> None:
    family, changes, named = FIELDS[case]
    folder = tmp_path / "model"
    shutil.copytree(saved / family, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=named) as raised:
        import_model(str(folder), tmp_path / "out")
    assert str(folder / "config.json") in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(47)


def _quantize(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(48, dtype=torch.int8)


def _mix(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].half()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_add, r"nothing in the model uses model.layers.0.self_attn.sinks"),
        (_drop, r"model.layers.1.mlp.up_proj.weight is missing"),
        (_reshape, r"model.norm.weight is \[47\], and the model's is \[48\]"),
        (_quantize, r"model.norm.weight is of dtype I8"),
        (_mix, r"k_proj.weight, .* are of different dtypes"),
    ],
    ids=["added", "dropped", "reshaped", "quantized", "mixed"],
)
def test_tensors_of_another_model_are_named(
    change: Callable[[dict[str, torch.Tensor]], None], named: str, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved / "llama", folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=named):
        import_model(str(folder), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_head_that_is_tied_and_differs_is_rejected(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved / "gpt2", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        import_model(str(folder), tmp_path / "out")


class Payload:
    """Unpickled, it makes a file: what a stranger's weights could do."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def test_a_pickle_does_not_run(saved: Path, tmp_path: Path) -> None:
    """Neither as weights to import, nor as those of family hf."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(saved / "llama", folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(ran)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: a pickle, which can run code"):
        import_model(str(folder), tmp_path / "out")
    with pytest.raises((OSError, pickle.UnpicklingError)):
        from_pretrained(str(folder), read_config(str(folder), {}))
    assert not ran.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert ran.exists(), "the file would have run code"


def test_code_that_comes_with_a_model_or_tokenizer_does_not_run(
    saved: Path, tmp_path: Path
) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(saved / "llama", folder)
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(ran)!r})\n")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="auto_map asks for code that comes with the tokenizer"):
        import_model(str(folder), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(UserError, match="custom code"):
        HubTokenizer(str(folder))
    values = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="trust_remote_code"):
        read_config(str(folder), {})
    assert not ran.exists()


def test_an_index_does_not_lead_out_of_the_folder(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved / "llama", folder)
    shutil.move(folder / "model.safetensors", tmp_path / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"\.\./model\.safetensors is no file name of this folder"):
        import_model(str(folder), tmp_path / "out")


def test_what_exists_is_not_written_to(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    run = finished_run(tmp_path / "run", SMALL, dict(GPT(GPTConfig(**SMALL)).named_parameters()))
    for write in (
        lambda: import_model(str(saved / "llama"), out),
        lambda: export(weights_of(run), out),
        lambda: consolidate(weights_of(run), out, torch.float32),
    ):
        with pytest.raises(UserError, match="it exists already"):
            write()
    assert not list(out.iterdir())


SMALL: dict[str, Any] = {"layers": 1, "hidden": 32, "heads": 2, "vocab": 257, "context": 16}


@pytest.mark.parametrize(
    ("changes", "options", "named"),
    [
        ({"bias": False}, {}, "gpt2: bias is False; llama: position is learned"),
        ({"position": "rope", "kv_heads": 1}, {}, "gpt_neox: kv_heads is 1"),
        ({"qk_norm": True}, {}, "gpt2: qk_norm is True"),
        ({"head_dim": 8}, {}, "gpt2: head_dim is 8"),
        ({"kv_heads": 1}, {}, "gpt2: kv_heads is 1"),
        ({"mlp": "swiglu"}, {}, "gpt2: ffn|gpt2: mlp is swiglu"),
        ({}, {"model_type": "mistral"}, r"\(mistral: position is learned"),
        ({}, {"model_type": "bert"}, "--family: 'bert' is not known"),
    ],
)
def test_a_decoder_that_no_family_computes_is_not_exported(
    changes: dict[str, Any], options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    model = GPT(GPTConfig(**SMALL | changes))
    run = finished_run(tmp_path / "run", SMALL | changes, dict(model.named_parameters()))
    with pytest.raises(UserError, match=named):
        export(weights_of(run), tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_without_final_weights_and_one_of_another_model(tmp_path: Path) -> None:
    model = GPT(GPTConfig(**SMALL | {"hidden": 64}))
    run = finished_run(tmp_path / "run", SMALL, dict(model.named_parameters()))
    with pytest.raises(UserError, match=r"embedding\.token\.weight is \[257, 64\]"):
        weights_of(run)
    (run / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no final weights, and no complete checkpoint"):
        weights_of(run)
    with pytest.raises(UserError, match="neither a run folder nor"):
        weights_of(tmp_path)
