"""A recipe: one YAML file plus overrides, read into frozen, validated objects.

The recipe owns model, data, parallel degrees, steps and global batch. The DeepSpeed JSON that it
names owns precision, ZeRO, offload, optimizer and clipping; keys under `deepspeed:` override it.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from yaml import YAMLError

from launch.errors import UserError
from launch.parallel_rules import check_parallel
from models.config import SIZES, GPTConfig, with_changes

ROOT = Path(__file__).resolve().parent.parent


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class GPTModel(_Block):
    """Our own decoder: a size from the table, fields of `GPTConfig`, or both (fields win)."""

    family: Literal["gpt"] = "gpt"
    size: str | None = None
    layers: PositiveInt | None = None
    hidden: PositiveInt | None = None
    heads: PositiveInt | None = None
    kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    ffn: PositiveInt | None = None
    vocab: PositiveInt | None = None
    context: PositiveInt | None = None
    position: Literal["learned", "rope"] | None = None
    rope_theta: float | None = None
    norm: Literal["layernorm", "rmsnorm"] | None = None
    norm_eps: float | None = None
    mlp: Literal["gelu", "swiglu"] | None = None
    bias: bool | None = None
    qk_norm: bool | None = None
    tied: bool | None = None
    dropout: float | None = None
    init_std: float | None = None
    checkpoint_activations: bool = False

    def gpt_config(self) -> GPTConfig:
        """The model's shape.

        Raises:
            UserError: for an unknown size, or sizes that contradict each other.
        """
        given = self.model_dump(exclude={"family", "size", "checkpoint_activations"})
        changes = {name: value for name, value in given.items() if value is not None}
        if self.size is not None and self.size not in SIZES:
            raise UserError(f"model.size: '{self.size}' is not known;{_nearest(self.size, SIZES)}")
        try:
            if self.size is not None:
                return with_changes(SIZES[self.size], changes)
            return GPTConfig(**changes)
        except TypeError:
            needed = [
                n for n in ("layers", "hidden", "heads", "vocab", "context") if not changes.get(n)
            ]
            raise UserError(f"model: give size, or all of: {', '.join(needed)}") from None
        except ValueError as error:
            raise UserError(f"model: {error}") from None


class HFModel(_Block):
    """Any causal language model of transformers, on the same engine.

    `path` is a folder or a Hub name with a config.json (weights are loaded where `pretrained`), or
    a config.json itself. `changes` replaces single values of that config, for example to shrink it.
    """

    family: Literal["hf"]
    path: str
    pretrained: bool = False
    changes: dict[str, Any] = {}
    checkpoint_activations: bool = False


class Data(_Block):
    """Where the text comes from, and how it becomes tokens: `launch/data.py`."""

    source: str | list[str] = "python-stdlib"
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    streaming: bool = False
    tokenizer: str = "bytes"
    sequence_length: PositiveInt
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02
    cache_dir: str | None = None


class Parallel(_Block):
    """Degrees of model parallelism; the data parallel size is what remains of the ranks.

    `sequence` is Megatron's sequence parallelism, over the tensor ranks. `schedule` orders the
    passes of a pipeline (`models/schedules.py`), and `partition` says where its layers are cut:
    parameters, uniform or type:REGEX (`models/pipeline.py`).
    """

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    sequence: bool = False
    schedule: Literal["1f1b", "gpipe", "naive"] = "1f1b"
    partition: str = "parameters"


class Schedule(_Block):
    """The factor on the JSON's learning rate: linear warm-up, then a decay to `min_ratio`."""

    decay: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1


class Train(_Block):
    """How long, how large a batch, and from which seed. Batch sizes count sequences."""

    steps: PositiveInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt
    seed: Annotated[int, Field(ge=0)] = 1234
    schedule: Schedule = Schedule()
    eval_every: Annotated[int, Field(ge=0)] = 0
    eval_batches: PositiveInt = 8
    compile: bool = False


class Checkpoint(_Block):
    """Save every `every` steps (0: never) and keep the newest `keep` of them."""

    every: Annotated[int, Field(ge=0)] = 0
    keep: PositiveInt = 2


class Run(_Block):
    """Where a run writes, and which trackers beside metrics.jsonl it writes to."""

    dir: str | None = None
    tensorboard: bool = True
    wandb: str | None = None
    sample_prompt: str = "def "
    sample_tokens: Annotated[int, Field(ge=0)] = 300


class Recipe(_Block):
    """Everything that a run depends on. `name` is the file's stem."""

    name: str
    model: Annotated[GPTModel | HFModel, Field(discriminator="family")]
    data: Data
    parallel: Parallel = Parallel()
    train: Train
    deepspeed: dict[str, Any]
    checkpoint: Checkpoint = Checkpoint()
    run: Run = Run()

    @model_validator(mode="before")
    @classmethod
    def _family_defaults_to_gpt(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("model"), dict):
            values["model"].setdefault("family", "gpt")
        return values

    def check(self) -> None:
        """Refuse what no number of ranks can mend.

        Raises:
            UserError: naming the key and what to do.
        """
        if not isinstance(self.deepspeed.get("config"), str):
            raise UserError("deepspeed.config: name a JSON file, for example ds_configs/zero1.json")
        if isinstance(self.model, GPTModel):
            context = self.model.gpt_config().context
            if self.data.sequence_length > context:
                raise UserError(
                    f"data.sequence_length: {self.data.sequence_length} is more than the model's "
                    f"context of {context}; lower it, or raise model.context"
                )
        check_parallel(self)

    def on_one_device(self) -> "Recipe":
        """The same training without model parallelism, for the reference."""
        return self.model_copy(update={"parallel": Parallel()})


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply dotted overrides such as `train.steps=30`.

    Raises:
        UserError: for a missing file, bad YAML, an unknown key (with the nearest valid one), a
            value of the wrong type or range, or a model whose sizes contradict each other.
    """
    path, values = read_values(path, overrides)
    try:
        plain = OmegaConf.to_container(values, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path} with {list(overrides)}: {error}") from None
    assert isinstance(plain, dict)
    return recipe_from_dict({**plain, "name": path.stem}, where=str(path))


def read_values(path: str | Path, overrides: Sequence[str]) -> tuple[Path, DictConfig]:
    """A recipe file's place and its values with the overrides merged in, neither checked nor complete.

    Raises:
        UserError: for a missing file, bad YAML, or an override that is no key=value.
    """
    path = Path(path)
    if not path.is_file() and (ROOT / path).is_file():
        path = ROOT / path  # started from another folder
    if not path.is_file():
        known = {p.stem: p for p in (ROOT / "recipes").glob("*.yaml")}
        raise UserError(f"--config: no recipe file {path};{_nearest(path.stem, known)}")
    try:
        values = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(values, DictConfig):
        raise UserError(f"{path}: a recipe is a mapping of blocks (model:, data:, train:, ...)")
    try:
        for override in overrides:
            key, equals, _ = override.partition("=")
            if not equals or not key.strip("."):
                raise UserError(f"--set {override}: write key=value, for example train.steps=30")
            merged = OmegaConf.merge(values, OmegaConf.from_dotlist([override]))
            assert isinstance(merged, DictConfig)
            values = merged
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} with {list(overrides)}: {error}") from None
    return path, values


def recipe_from_dict(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate plain values, for example those of a run folder's resolved recipe.

    Raises:
        UserError: as `load_recipe`.
    """
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None
    try:
        recipe.check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return recipe


def _explain(error: ValidationError) -> str:
    first, others = error.errors()[0], error.error_count() - 1
    # The discriminator's value ("gpt") is part of pydantic's location, and not of the file's.
    location = [
        str(part) for i, part in enumerate(first["loc"]) if not (i == 1 and part in ("gpt", "hf"))
    ]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        valid = _fields_beside(first["loc"])
        message = f"unknown key {key};{_nearest(location[-1], valid)}"
    elif first["type"] == "missing":
        message = f"{key} is missing"
    else:
        message = f"{key}: {first['msg']}, but it is {first['input']!r}"
    return message + (f" (and {others} more)" if others else "")


def _fields_beside(location: tuple[int | str, ...]) -> list[str]:
    block: type[BaseModel] = Recipe
    for part in location[:-1]:
        if block is Recipe and part == "model":
            block = GPTModel
        elif part == "hf":
            block = HFModel
        elif part != "gpt":
            annotation = block.model_fields[str(part)].annotation
            assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
            block = annotation
    return [name for name in block.model_fields if name != "name"]


def _nearest(word: str, valid: Any) -> str:
    names = sorted(valid)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f" did you mean '{close[0]}'?"
    return f" choose from: {', '.join(names)}"
