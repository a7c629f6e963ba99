"""A model of transformers as a folder of our weights, from which a recipe's `init_from` starts."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from launch.checkpoint.safetensors_io import SHARD_BYTES
from launch.errors import UserError
from launch.hf.config import from_transformers
from launch.hf.families import Family
from launch.hf.model_card import ORIGIN
from launch.hf.read_weights import WeightFiles
from launch.hf.tensors import check_shapes, correspondences, names_in_files
from launch.hf.tokenizer_files import FILES, import_tokenizer
from launch.hf.write_weights import new_folder_at, write_sharded
from models.config import GPTConfig

MODEL_YAML = "model.yaml"


def import_model(source: str, out: Path, shard_bytes: int = SHARD_BYTES) -> str:
    """Write a model's weights under our names, `model.yaml`, and its tokenizer; returns what to say.

    Weights keep their dtype. Holds in memory the tensors of one of ours at a time.

    Args:
        source: a folder, or a name on the Hub.
        out: the new folder.
        shard_bytes: the largest weights file.

    Raises:
        UserError: if `out` exists, if the model is not one that our decoder computes, if it needs
            code of its own, or if it has no safetensors.
    """
    if out.exists():
        raise UserError(f"{out}: it exists already; name a new folder")
    folder = _folder(source)
    family, config = from_transformers(folder / "config.json")
    files = WeightFiles(folder)
    names = names_in_files(family, files.shapes, str(folder))
    if config.tied and family.head in names:
        _check_tied(files, names, family)
    table = correspondences(family, config)
    expected = {n: shape for each in table for n, shape in each.their_shapes().items()}
    check_shapes(expected, {n: files.shapes[name] for n, name in names.items()}, str(folder))
    specs = {each.ours: (each.shape, files.dtype(names[each.theirs[0]])) for each in table}
    for each in table:
        if {files.dtype(names[name]) for name in each.theirs} != {specs[each.ours][1]}:
            raise UserError(f"{folder}: {', '.join(each.theirs)} are of different dtypes")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for each in table:
            yield each.ours, each.to_ours(lambda name: files.read(names[name]))

    with new_folder_at(out) as new:
        has_tokenizer = import_tokenizer(folder, new)
        (new / MODEL_YAML).write_text(_model_yaml(config, out))
        (new / ORIGIN).write_text(json.dumps(_origin(source, folder), indent=2) + "\n")
        write_sharded(new, specs, tensors(), shard_bytes)
    hint = f"data: {{tokenizer: {out}}}" if has_tokenizer else "no tokenizer came with the model"
    return f"{out / MODEL_YAML}: the model block of a recipe that starts from it; {hint}"


def _folder(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: there is no such folder")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            source, allow_patterns=["model*.safetensors*", "*config.json", "README.md", *FILES]
        )
    except Exception as error:  # network, name, access: all end here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"no folder is called '{source}', and the Hub does not give it: {reason}"
        ) from None
    return Path(found)


def _check_tied(files: WeightFiles, names: dict[str, str], family: Family) -> None:
    """Drop the head from the names if it repeats the embedding.

    Raises:
        UserError: if it does not: config.json says that the two are one.
    """
    head, token = names.pop(family.head), f"{family.layers[0].theirs[0]}.weight"
    if token not in names:
        return
    same = files.shapes[head] == files.shapes[names[token]]
    if not same or not files.read(head).equal(files.read(names[token])):
        raise UserError(
            f"{files.folder}: {head} differs from {names[token]}, and config.json says that "
            "tie_word_embeddings makes one of them"
        )


def _model_yaml(config: GPTConfig, out: Path) -> str:
    values: dict[str, Any] = {"init_from": str(out.absolute()), "family": "gpt", **asdict(config)}
    return yaml.safe_dump({"model": values}, sort_keys=False)


def _origin(source: str, folder: Path) -> dict[str, str]:
    """The model's name on the Hub, and the licence that its own card states."""
    origin = {} if Path(source).expanduser().is_dir() else {"name": source}
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if text.startswith("---\n"):
        try:
            values = yaml.safe_load(text.split("---\n")[1])
        except yaml.YAMLError:
            return origin
        if isinstance(values, dict) and isinstance(values.get("license"), str):
            origin["license"] = values["license"]
    return origin
