"""model.init_from: any layout starts from the weights of a transformers model, and from no others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file

from launch.checkpoint.full_weights import full_weights
from launch.config.load import recipe_from_dict
from launch.config.schema import GPTModel, Recipe
from launch.errors import UserError
from launch.hf.import_model import import_model
from launch.hf.read_weights import weights_of
from launch.training.setup import local_engine, plan_run
from launch.training.train_step import train_step
from tests.hf.peers import PEERS, peer, saved_peer
from tests.ranks import RankDiedError, run_ranks
from tests.resume.layouts import BEFORE, saved, saver
from tests.resume.runs import train, write_text

VOCAB = 261  # 257 byte tokens, and not divided by any number of ranks
BOUND = 2e-6  # of the loss, which is about 6


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with imported models, by name in PEERS, and a text to train on."""
    folder = tmp_path_factory.mktemp("imported")
    for name in ("llama", "llama, tied, biases, wide heads", "qwen3, tied", "gpt2"):
        saved_peer(_values(name), folder / "theirs" / name)
        import_model(str(folder / "theirs" / name), folder / name)
    write_text(folder / "text")
    return folder


def _values(name: str) -> dict[str, Any]:
    return PEERS[name] | {"vocab_size": VOCAB}


def recipe_values(folder: Path, name: str, config: str = "zero1", **blocks: Any) -> dict[str, Any]:
    """A recipe that starts from one of the imported models, in fp32."""
    model = yaml.safe_load((folder / name / "model.yaml").read_text())["model"]
    return {
        "name": "fine",
        "model": model | {"dropout": 0.0} | blocks.pop("model", {}),
        "data": {
            "source": str(folder / "text"), "sequence_length": 16,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"steps": 3, "global_batch_size": 4, "micro_batch_size": 1},
        "deepspeed": {"config": f"ds_configs/{config}.json", "bf16": {"enabled": False}},
        "run": {"tensorboard": False, "sample_tokens": 0},
        **blocks,
    }  # fmt: skip


def start(values: dict[str, Any], scratch: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """The first loss in the recipe's layout, and the whole weights before it, which are saved too."""
    with local_engine(values, scratch) as local:
        weights = {name: tensor.cpu() for name, tensor in full_weights(local.engine)}
        saver(local, scratch / "run").save(BEFORE)
        return train_step(local.engine, local.batch(0)).loss, weights


def transformers_loss(recipe: Recipe, name: str) -> float:
    """The loss of the transformers model on the recipe's first global batch.

    For each token that was added to its vocabulary, it has the mean of all logits.
    """
    batch = plan_run(recipe.on_one_device(), 1).batch(0)
    tokens, labels = (part.reshape(-1, part.shape[-1]) for part in (batch.tokens, batch.labels))
    assert isinstance(recipe.model, GPTModel)
    with torch.no_grad():
        logits = peer(_values(name))(tokens).logits
    mean = logits.mean(-1, keepdim=True).expand(-1, -1, recipe.model.shape.vocab - VOCAB)
    return float(F.cross_entropy(torch.cat((logits, mean), -1).flatten(0, 1), labels.flatten()))


LAYOUTS = [
    pytest.param("llama", "zero1", 2, {"parallel": {"tensor": 2}}, id="tensor"),
    pytest.param("qwen3, tied", "zero1", 2, {"parallel": {"pipeline": 2}}, id="pipeline, tied"),
    pytest.param("llama", "zero3", 2, {}, id="zero3"),
    # Two ranks share each key/value head, and the last one holds padding of the vocabulary.
    pytest.param(
        "llama, tied, biases, wide heads", "zero1", 4,
        {"parallel": {"tensor": 4}, "model": {"vocab": 270}}, id="tensor 4, larger vocabulary",
    ),
    pytest.param("gpt2", "zero1", 1, {}, id="one device", marks=pytest.mark.matrix),
    pytest.param(
        "gpt2", "zero2", 4, {"parallel": {"tensor": 2}, "model": {"vocab": 264}},
        id="tensor and data, larger vocabulary", marks=pytest.mark.matrix,
    ),
    pytest.param(
        "llama, tied, biases, wide heads", "zero3", 4, {"parallel": {"tensor": 2}},
        id="zero3 and tensor", marks=pytest.mark.matrix,
    ),
    pytest.param(
        "llama", "zero1", 4, {"parallel": {"tensor": 2, "pipeline": 2}},
        id="tensor and pipeline", marks=pytest.mark.matrix,
    ),
    pytest.param("llama", "zero3_offload_cpu", 2, {}, id="offload", marks=pytest.mark.matrix),
]  # fmt: skip


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize(("name", "config", "ranks", "blocks"), LAYOUTS)
def test_the_first_loss_is_that_of_the_transformers_model(
    name: str, config: str, ranks: int, blocks: dict[str, Any], imported: Path, tmp_path: Path
) -> None:
    values = recipe_values(imported, name, config, **blocks)
    loss, weights = run_ranks(start, ranks, values, tmp_path)[0]
    expected = transformers_loss(recipe_from_dict(values), name)
    assert abs(loss - expected) < BOUND * expected
    # The checkpoint of this layout, which holds what each rank has, as whole tensors.
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps(values))
    from_checkpoint = dict(weights_of(saved(tmp_path / "run")).tensors())
    assert list(from_checkpoint) == list(weights)
    assert all(weights[key].equal(tensor) for key, tensor in from_checkpoint.items())
    files = load_file(imported / name / "model.safetensors")
    assert weights.keys() == files.keys()
    for key, tensor in files.items():
        rows = len(tensor)
        assert weights[key][:rows].equal(tensor), key
        mean = tensor.double().mean(0).float().expand_as(weights[key][rows:])
        torch.testing.assert_close(weights[key][rows:], mean)


def test_a_run_that_resumes_needs_the_folder_no_more(imported: Path, tmp_path: Path) -> None:
    shutil.copytree(imported / "llama", tmp_path / "weights")
    values = recipe_values(
        imported, "llama", model={"init_from": str(tmp_path / "weights")},
        checkpoint={"every": 2},
        run={"dir": str(tmp_path / "run"), "tensorboard": False, "sample_tokens": 0},
    )  # fmt: skip
    with pytest.raises(RankDiedError):
        train(values, kill_after=2, ranks=1)
    shutil.rmtree(tmp_path / "weights")
    assert len(weights_of(tmp_path / "run").shapes) == 15  # of its newest checkpoint
    train(values, resume="auto", ranks=1)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


def _rejection(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as raised:
        plan_run(recipe_from_dict(values), 1)
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm_eps": 1e-3}, "model with norm_eps 1e-06; set model.norm_eps so"),
        ({"rope_theta": 1e4}, "model with rope_theta 500000.0; set model.rope_theta so"),
        ({"layers": 3}, "model with layers 2"),
        ({"vocab": 257}, "embedding.token.weight is [261, 48], and the model's is [257, 48]"),
        ({"init_from": "/nowhere"}, "model.init_from: there is no folder /nowhere"),
    ],
)
def test_another_model_is_rejected(changes: dict[str, Any], named: str, imported: Path) -> None:
    assert named in _rejection(recipe_values(imported, "llama", model=changes))


def test_tensors_that_are_missing_or_extra_are_named(imported: Path, tmp_path: Path) -> None:
    """Of a folder that does not say what its weights are of."""
    tensors = load_file(imported / "llama" / "model.safetensors")
    values = recipe_values(imported, "llama", model={"init_from": str(tmp_path)})
    save_file(
        {n: t for n, t in tensors.items() if n != "norm.weight"}, tmp_path / "model.safetensors"
    )
    assert f"model.init_from: {tmp_path}: norm.weight is missing" in _rejection(values)
    save_file(tensors | {"scale": torch.ones(1)}, tmp_path / "model.safetensors")
    assert "nothing in the model uses scale" in _rejection(values)


def test_the_folder_is_not_the_one_that_the_run_writes_to(imported: Path) -> None:
    run = {"dir": str(imported / "llama")}
    assert "it is the folder that run.dir writes to" in _rejection(
        recipe_values(imported, "llama", run=run)
    )
