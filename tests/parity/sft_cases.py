"""Fine-tuning on the conversations of `conversations.py`, in a layout, and by hand on one device."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launch.config.load import recipe_from_dict
from launch.config.schema import Recipe
from launch.parity.run import TrainingRecord
from launch.training.build_model import build_model
from tests.parity.cases import Case
from tests.parity.conversations import CONVERSATIONS, Example, Trained, example, train, write

LENGTH = 240  # puts what is left of the conversations into four rows, which are 69 to 93% full
ROWS = 4
HELD_OUT = 6  # of the conversations: the one whose key has the smallest hash
STEPS, RATE, EPS, SEED = 3, 1e-2, 1e-3, 7
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": LENGTH, "tie_word_embeddings": False,
}  # fmt: skip
LORA: dict[str, Any] = {"rank": 3, "alpha": 12, "targets": ["q_proj", "v_proj", "down_proj"]}


def trained_on() -> list[Example]:
    """What a run trains on at each step: all conversations but the one that is held out."""
    return [example(turns) for i, turns in enumerate(CONVERSATIONS) if i != HELD_OUT]


@dataclass(frozen=True)
class SFTCase(Case):
    """A tiny recipe's layout on conversations. `model`: gpt, or a transformers Llama: hf, or lora."""

    model: str = "gpt"

    @property
    def name(self) -> str:
        """For pytest's list."""
        changed = [override.rpartition(".")[2] for override in self.overrides]
        return "-".join([self.stem, str(self.ranks), self.precision, self.model, *changed])

    def recipe(self, folder: Path, changes: dict[str, Any] | None = None) -> Recipe:
        """The recipe; every step sees each conversation once, in four rows of a row a micro batch."""
        settings = {
            "train.global_batch_size": ROWS, "train.steps": STEPS, "train.seed": SEED,
            "train.schedule.warmup_steps": 0, "train.schedule.decay": "constant",
            "deepspeed.optimizer.params.lr": RATE, "deepspeed.optimizer.params.eps": EPS,
            "deepspeed.optimizer.params.weight_decay": 0.0, "deepspeed.gradient_clipping": 0.0,
            "data.sequence_length": LENGTH, "model.context": LENGTH, "data.format": "chat",
            "data.source": write(folder / "chat.jsonl", CONVERSATIONS), "data.held_out": 1e-9,
            "data.chat_template": "recipes/chatml.jinja", **(changes or {}),
        }  # fmt: skip
        values = super().recipe(folder, settings).model_dump()
        if self.model != "gpt":
            values["model"] = {"family": "hf", "path": str(saved_llama(folder)), "pretrained": True}
            values["model"]["checkpoint_activations"] = self.checkpoint_activations
        if self.model == "lora":
            values["model"]["lora"] = LORA
        return recipe_from_dict(values)


def saved_llama(folder: Path) -> Path:
    """A folder with a small Llama and its weights, as one comes from the Hub."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = folder / "llama"
    if not path.exists():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA))
        model.save_pretrained(path)
    return path


def plain_model(case: SFTCase, folder: Path) -> nn.Module:
    """The model on one device: of family hf as transformers loads it and peft adapts it."""
    if case.model == "gpt":
        return build_model(case.recipe(folder), torch.float32, "cpu")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        saved_llama(folder), dtype=torch.float32
    )
    if case.model == "hf":
        return model
    torch.manual_seed(SEED)
    config = LoraConfig(
        r=LORA["rank"],
        lora_alpha=LORA["alpha"],
        target_modules=LORA["targets"],
        task_type="CAUSAL_LM",
    )
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def by_hand(case: SFTCase, folder: Path) -> Trained:
    """The same training without the project's data, batches, loss, packing and optimizer."""
    trained = train(plain_model(case, folder), trained_on(), STEPS, RATE, EPS)
    names = {name: name.removeprefix("base_model.model.") for name in trained.weights}
    return trained._replace(weights={names[n]: t for n, t in trained.weights.items()})


def apart(expected: Trained, found: TrainingRecord) -> dict[str, float]:
    """The largest relative difference in losses, gradient norms and trained weights."""
    weights = {n: found.weights[n].view_as(t) for n, t in expected.weights.items()}
    pairs = {
        "loss": zip(expected.losses, found.losses, strict=True),
        "grad norm": zip(expected.norms, found.grad_norms, strict=True),
    }
    worst = {name: max(abs(a - b) / abs(a) for a, b in each) for name, each in pairs.items()}
    worst["weights"] = max(
        float((weights[n] - t).norm() / t.norm()) for n, t in expected.weights.items()
    )
    return worst
