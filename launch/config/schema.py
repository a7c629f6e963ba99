"""The schema of a recipe: frozen, validated blocks; an unknown key is an error."""

import math
from dataclasses import fields
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, create_model, model_validator

from launch.errors import UserError, nearest_or_all
from models.config import SIZES, GPTConfig, with_changes
from models.parallel.grid import AXES


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class _Size(_Block):
    family: Literal["gpt"] = "gpt"
    size: str | None = None


if TYPE_CHECKING:
    _Shape = _Size
else:
    # Every field of GPTConfig with the same checks; None if the recipe omits it.
    _Shape = create_model(
        "_Shape",
        __base__=_Size,
        **{
            field.name: ((PositiveInt if field.type is int else field.type) | None, None)
            for field in fields(GPTConfig)
        },
    )


class GPTModel(_Shape):
    """Our own decoder: a named size, fields of `GPTConfig`, or both (fields take precedence).

    `init_from` is a folder with the initial weights, of `scripts/import_hf.py` or a finished run;
    without it, they are drawn. The other keys trade time for memory (`models/gpt.py`): what is computed
    again in the backward pass, and in how many chunks of the sequence.
    """

    checkpoint_activations: bool = False
    cpu_checkpointing: bool = False
    mlp_chunks: PositiveInt = 1
    loss_chunks: PositiveInt = 1
    init_from: str | None = None

    @cached_property
    def shape(self) -> GPTConfig:
        """The model's shape with all defaults filled in.

        Raises:
            UserError: for an unknown size or inconsistent sizes.
        """
        given = {field.name: getattr(self, field.name) for field in fields(GPTConfig)}
        changes = {name: value for name, value in given.items() if value is not None}
        if self.size is not None and self.size not in SIZES:
            raise UserError(
                f"model.size: '{self.size}' is not known;{nearest_or_all(self.size, SIZES)}"
            )
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


class Lora(_Block):
    """Train low-rank adapters (arXiv:2106.09685) beside frozen weights; see `launch/training/lora.py`.

    A linear layer's output `W x` becomes `W x + alpha / rank * B A x`. `targets` are the last parts
    of the layers' names, such as q_proj, or all-linear: every linear layer but the output.
    """

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"


class HFModel(_Block):
    """Any causal language model from transformers, on the same engine.

    `path` is a folder or Hub name with a config.json (weights are loaded if `pretrained`), or a
    config.json itself. `changes` overrides values of that config, for example to shrink the model.
    With `lora`, only adapters are trained.
    """

    family: Literal["hf"]
    path: str
    pretrained: bool = False
    changes: dict[str, Any] = {}
    checkpoint_activations: bool = False
    lora: Lora | None = None


class Data(_Block):
    """The source and how it is tokenised; see `launch/data/prepare.py`.

    With `document_mask`, tokens attend only within their own document, and positions count from its
    start (arXiv:2407.21783, section 3.2); without it, a row is treated as one text.

    With `format: chat`, a row of the source has a conversation in `messages_field`, and only the
    assistant's answers count towards the loss; see `launch/data/chat.py`. `chat_template` is a file
    that takes the place of the tokenizer's own template.
    """

    source: str | list[str] = "python-stdlib"
    subset: str | None = None
    split: str = "train"
    format: Literal["text", "chat"] = "text"
    text_field: str = "text"
    messages_field: str = "messages"
    chat_template: str | None = None
    streaming: bool = False
    tokenizer: str = "bytes"
    sequence_length: PositiveInt
    document_mask: bool = False
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02
    cache_dir: str | None = None

    @property
    def column_key(self) -> str:
        """The key of this block that names the column to read."""
        return "messages_field" if self.format == "chat" else "text_field"

    @property
    def has_documents(self) -> bool:
        """Whether a row of a batch holds documents that attention keeps apart; conversations always."""
        return self.document_mask or self.format == "chat"


class Parallel(_Block):
    """Degrees of model parallelism; the remaining factor of the world size is data parallel.

    `sequence` is Megatron's sequence parallelism over the tensor ranks. `schedule` orders the
    pipeline's passes (`models/pipeline_schedules.py`), and `partition` splits its layers into
    stages: parameters, flops, uniform or type:REGEX (`models/pipeline_stages.py`). With the interleaved
    schedule, each stage has `model_chunks` parts of the model. With `copy_engine`, on GPUs, two tensor
    ranks add up by copies (`models/parallel/copy_engine.py`). Every axis of `models/parallel/grid.py`
    except the data axis has a field of the same name.
    """

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    sequence: bool = False
    copy_engine: bool = False
    schedule: Literal["1f1b", "interleaved", "zb-h1", "gpipe", "naive"] = "1f1b"
    model_chunks: PositiveInt = 1
    partition: str = "parameters"

    def degrees(self) -> dict[str, int]:
        """The number of ranks along each axis of the grid except the data axis."""
        return {axis: getattr(self, axis) for axis in reversed(AXES) if axis != "data"}

    @property
    def model_parallel_size(self) -> int:
        """The number of ranks that hold one copy of the model: the fewest that the recipe runs on."""
        return math.prod(self.degrees().values())


class Schedule(_Block):
    """The multiplier of the JSON's learning rate: linear warm-up, then decay to `min_ratio`."""

    decay: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1


class Train(_Block):
    """Steps, batch sizes (in sequences) and seed.

    `micro_batch_size` is an upper limit; see `launch/config/layout.py`. On GPUs, `cuda_graphs` launches a
    compiled pass as one, and `deterministic` takes the kernels that give the same bits each time, which
    are slower.
    """

    steps: PositiveInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt
    seed: Annotated[int, Field(ge=0)] = 1234
    schedule: Schedule = Schedule()
    eval_every: Annotated[int, Field(ge=0)] = 0
    eval_batches: PositiveInt = 8
    compile: bool = False
    cuda_graphs: bool = False
    deterministic: bool = False


class Checkpoint(_Block):
    """Save every `every` steps (0: never) and keep the newest `keep` of them.

    `on_signal`: a run that saves at all also saves when SIGTERM or SIGUSR1 comes, and exits with code 75.
    `asynchronous` copies the state to host memory and writes it while training goes on.
    """

    every: Annotated[int, Field(ge=0)] = 0
    keep: PositiveInt = 2
    on_signal: bool = True
    asynchronous: bool = False


class Run(_Block):
    """The output folder, and the trackers to use in addition to metrics.jsonl."""

    dir: str | None = None
    tensorboard: bool = True
    wandb: str | None = None
    sample_prompt: str = "def "
    sample_tokens: Annotated[int, Field(ge=0)] = 100


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

    def with_adapters_merged(self) -> "Recipe":
        """The recipe of the final weights, into which a run with `model.lora` merges its adapters."""
        if isinstance(self.model, GPTModel):
            return self
        return self.model_copy(update={"model": self.model.model_copy(update={"lora": None})})

    def on_one_device(self, micro_batch: int | None = None) -> "Recipe":
        """The same training without model parallelism, as a reference.

        `micro_batch` sets the micro batch size, to match the layout under comparison.
        """
        train = self.train
        if micro_batch is not None:
            train = train.model_copy(update={"micro_batch_size": micro_batch})
        return self.model_copy(update={"parallel": Parallel(), "train": train})

    def without_init_from(self) -> "Recipe":
        """The same recipe for weights that come from elsewhere: a checkpoint, or a finished run."""
        if not isinstance(self.model, GPTModel):
            return self
        model = self.model.model_copy(update={"init_from": None})
        return self.model_copy(update={"model": model})
