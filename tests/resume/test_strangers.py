"""A checkpoint of a stranger cannot run code, and a damaged one is told by name."""

import ast
import hashlib
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.checkpoint.manifest import find_damage
from launch.errors import UserError
from launch.paths import ROOT
from tests.ranks import run_ranks
from tests.resume.runs import train, values, write_text

ZERO1: dict[str, Any] = {"config": "ds_configs/zero1.json", "bf16": {"enabled": False}}


class _Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_text(folder / "text")
    train(values(folder, **ZERO1), ranks=1)
    return folder


def _resume(folder: Path) -> None:
    import launch.train
    from launch.config.load import recipe_from_dict

    recipe = values(folder, **ZERO1)
    recipe["train"]["steps"] += 1
    launch.train.train(recipe_from_dict(recipe), "auto")


def _newest(folder: Path) -> Path:
    return max((folder / "run/checkpoints").glob("step_*"))


def _replace(file: Path, content: bytes) -> None:
    """Put other content in a file, and its size and checksum into the manifest, as an attacker would."""
    file.write_bytes(content)
    listing = file.parent / "manifest.json"
    manifest = json.loads(listing.read_text())
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"][file.name] = {"bytes": len(content), "sha256": digest}
    listing.write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["state_rank0000_000.safetensors", "generators_rank0000.json"])
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickle_in_a_checkpoint_is_not_run(
    name: str, how: str, trained: Path, tmp_path: Path
) -> None:
    file, trace = _newest(trained) / name, tmp_path / "was here"
    kept = {f: f.read_bytes() for f in (file, file.parent / "manifest.json")}
    payload = _Payload(f"touch '{trace}'")
    torch.save(payload, tmp_path / "payload")
    content = pickle.dumps(payload) if how == "pickle" else (tmp_path / "payload").read_bytes()
    # The payload is live: whoever unpickles it runs it.
    if how == "pickle":
        pickle.loads(content)
    else:
        with zipfile.ZipFile(tmp_path / "payload") as archive:
            pickle.loads(archive.read("payload/data.pkl"))
    assert trace.exists()
    trace.unlink()
    try:
        _replace(file, content)
        assert find_damage(file.parent) is None
        with pytest.raises(
            UserError, match=r"cannot be read.*remove it and resume from an earlier"
        ):
            run_ranks(_resume, 1, trained)
        assert not trace.exists()
    finally:
        for path, before in kept.items():
            path.write_bytes(before)


def unsafe_calls(source: str) -> list[str]:
    """Calls in a file's source that unpickle without restriction."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(ast.unparse(node))
        if name.endswith("load_checkpoint") or given.get("trust_remote_code") == "True":
            found.append(ast.unparse(node))
        if name in ("pickle.load", "pickle.loads", "np.load", "joblib.load"):
            found.append(ast.unparse(node))
    return found


# The project's own processes talk to each other in pickles, over pipes that they make.
OWN_PIPES = {"launch/runtime/fork_server.py", "launch/versions/forked.py"}


def test_nothing_loads_a_pickle_without_restriction() -> None:
    for bad in (
        "torch.load(f)", "torch.load(f, weights_only=False)", "pickle.loads(b)",
        "engine.load_checkpoint(d)", "f(trust_remote_code=True)",
    ):  # fmt: skip
        assert unsafe_calls(bad)
    found = {
        str(file.relative_to(ROOT)): calls
        for folder in ("launch", "models", "scripts")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if (calls := unsafe_calls(file.read_text()))
    }
    assert found.keys() <= OWN_PIPES, found


@pytest.mark.parametrize("file", ["state_rank0000_000.safetensors", "generators_rank0000.json"])
def test_one_changed_bit_is_found_and_the_one_before_is_taken(file: str, trained: Path) -> None:
    newest = _newest(trained)
    content = bytearray((newest / file).read_bytes())
    content[len(content) // 2] ^= 1
    kept = (newest / file).read_bytes()
    try:
        (newest / file).write_bytes(content)
        wrong = find_damage(newest)
        assert wrong is not None
        assert f"{file} has changed since it was saved" in wrong
        assert find_damage(newest, checksums=False) is None
    finally:
        (newest / file).write_bytes(kept)
