"""Make what the recipes hf_tiny_* need, without a network: a model, its tokenizer, and chat data.

    python scripts/make_tiny_chat.py
    deepspeed --num_gpus 2 launch/train.py --config recipes/hf_tiny_sft_zero2.yaml

The folder is as one from the Hub: a Qwen3 of 0.2 million parameters with random weights, a tokenizer
with a chat template, and chat.jsonl, 2,000 conversations about sums. The same each time.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

from launch.errors import explain_missing_packages

explain_missing_packages()

import argparse
import json
import random

from launch.paths import ROOT
from launch.runtime.failures import one_line_errors

FOLDER = ROOT / ".cache" / "tiny_chat"
ROWS, SEED, TOKENS = 2000, 0, 512
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MODEL = {
    "model_type": "qwen3", "vocab_size": TOKENS, "hidden_size": 64, "intermediate_size": 192,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


def conversation(numbers: random.Random) -> list[dict[str, str]]:
    """One to three questions about sums, each with its answer."""
    messages = []
    for _ in range(numbers.randint(1, 3)):
        a, b = numbers.randint(0, 20), numbers.randint(0, 20)
        question = numbers.choice(["What is {} + {}?", "Add {} and {}.", "{} plus {} is?"])
        messages.append({"role": "user", "content": question.format(a, b)})
        messages.append({"role": "assistant", "content": f"{a} + {b} = {a + b}."})
    return messages


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """A byte-level BPE of these texts, and the settings that transformers reads beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[0],
        "chat_template": (ROOT / "recipes" / "chatml.jinja").read_text(),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def make(folder: Path) -> None:
    """Write the model, the tokenizer and the conversations into a folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    numbers = random.Random(SEED)
    rows = [conversation(numbers) for _ in range(ROWS)]
    lines = [json.dumps({"messages": messages}) + "\n" for messages in rows]
    (folder / "chat.jsonl").write_text("".join(lines))
    write_tokenizer(folder, [message["content"] for messages in rows for message in messages])
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL)).save_pretrained(folder)
    print(f"a model, its tokenizer and {ROWS:,} conversations: {folder}")


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(
        description="Make the model and data of the recipes hf_tiny_*."
    )
    parser.add_argument("--to", type=Path, default=FOLDER, help=f"the folder (default: {FOLDER})")
    arguments = parser.parse_args()
    with one_line_errors():
        make(arguments.to)


if __name__ == "__main__":
    main()
