"""Tokenizers as files that `AutoTokenizer` opens, with the ids that the model was trained on."""

import json
import shutil
from pathlib import Path

from launch.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer
from launch.errors import UserError
from launch.hf.config import read_object

SETTINGS = "tokenizer_config.json"
# Text and settings, no code. merges.txt, vocab.json and tokenizer.model are older formats.
FILES = (
    "tokenizer.json", SETTINGS, "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
ANY_FILE_ALONE = "PreTrainedTokenizerFast"  # reads tokenizer.json, and knows no model's rules
BYTES_END = "<|endoftext|>"
# Spaces, line ends, case, digits, accents in both forms, scripts, a token's own name.
SAMPLE = (
    "def  f(x):\n\treturn x ** 2  # It's 1,234.5!\r\n\n"
    "Über café cafe\u0301 中文 العربية 😀 <|endoftext|>"
)


def export_tokenizer(name: str, folder: Path, context: int) -> Tokenizer:
    """Write a run's tokenizer into a folder with a model's config.json; returns the run's.

    Args:
        name: `data.tokenizer` of the recipe.
        folder: where the exported model is written.
        context: the longest text, in tokens.

    Raises:
        UserError: if it cannot be loaded, or `AutoTokenizer` would give other ids.
    """
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(name)
    if isinstance(tokenizer, ByteTokenizer):
        _write_bytes(folder, context)
    elif isinstance(tokenizer, FileTokenizer):
        _copy(Path(name).expanduser(), tokenizer, folder, context)
    else:
        AutoTokenizer.from_pretrained(name, trust_remote_code=False).save_pretrained(folder)
    if not _same_ids(tokenizer, folder):
        raise UserError(f"data.tokenizer: AutoTokenizer gives other ids than {name}")
    return tokenizer


def import_tokenizer(folder: Path, out: Path) -> bool:
    """Copy a model's tokenizer; makes the tokenizer.json that recipes need if there is none.

    Returns whether there is a tokenizer.

    Raises:
        UserError: if it needs code of its own, or cannot be turned into a tokenizer.json.
    """
    settings = folder / SETTINGS
    if settings.is_file() and "auto_map" in read_object(settings):
        raise UserError(
            f"{settings}: auto_map asks for code that comes with the tokenizer, and none is ever run"
        )
    found = [folder / file for file in FILES if (folder / file).is_file()]
    for file in found:
        shutil.copyfile(file, out / file.name)
    if not found or (out / "tokenizer.json").is_file():
        return bool(found)
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(out)
    except Exception as error:  # transformers raises errors of any type
        raise UserError(f"{folder}: its tokenizer cannot be read: {_first_line(error)}") from None
    if not (out / "tokenizer.json").is_file():
        raise UserError(f"{folder}: its tokenizer has no form as tokenizer.json")
    return True


def _write_bytes(folder: Path, context: int) -> None:
    """Bytes as ids: a BPE without merges over the 256 characters that stand for bytes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    # split_special_tokens: the separator's name in a text is bytes, as in training.
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=BYTES_END,
        split_special_tokens=True,
        model_max_length=context,
    ).save_pretrained(folder)


def _byte_characters() -> list[str]:
    """The character that ByteLevel writes for each byte (GPT-2's table).

    A printable byte is itself, and the others follow from U+0100 on in their order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _copy(path: Path, tokenizer: Tokenizer, folder: Path, context: int) -> None:
    file = path / "tokenizer.json" if path.is_dir() else path
    shutil.copyfile(file, folder / "tokenizer.json")
    for name in FILES[1:5]:
        if file.with_name(name).is_file():
            shutil.copyfile(file.with_name(name), folder / name)
    # A model's own class would build its tokenizer anew from the vocabulary, by that model's rules.
    settings = {"model_max_length": context, "eos_token": _separator_name(file, tokenizer)}
    if (folder / SETTINGS).is_file():
        settings |= read_object(folder / SETTINGS)
        settings.pop("auto_map", None)  # code that came with it, which the ids do not need
    settings["tokenizer_class"] = ANY_FILE_ALONE
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def _separator_name(file: Path, tokenizer: Tokenizer) -> str:
    from tokenizers import Tokenizer as Backend

    return str(Backend.from_file(str(file)).id_to_token(tokenizer.separator))


def _same_ids(tokenizer: Tokenizer, folder: Path) -> bool:
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    exported.model_max_length = 10**30  # no warning about the sample's length
    ids = exported(SAMPLE, add_special_tokens=False)["input_ids"]
    return bool(
        list(ids) == tokenizer.encode(SAMPLE) and exported.eos_token_id == tokenizer.separator
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
