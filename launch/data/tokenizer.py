"""Tokenizers: raw bytes, a local tokenizer.json, or a tokenizer from the Hub."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from launch.errors import UserError

if TYPE_CHECKING:
    import tokenizers
    import transformers

Ids: TypeAlias = npt.NDArray[np.int64]

# End-of-document tokens of well-known tokenizers, for those whose files do not name it.
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class HubError(UserError):
    """The Hub does not give a tokenizer: a wrong name, no access, or no network."""


class Tokenizer(Protocol):
    """The tokenizer interface."""

    name: str
    """As in the recipe: `bytes`, a path, or a Hub name."""
    identity: str
    """Changes whenever the ids change; part of the cache key."""
    vocab_size: int
    """The largest id plus one."""
    separator: int
    """The id appended to every document."""
    chat_template: str | None
    """How it writes a conversation, in Jinja; None if it does not say."""
    special_tokens: dict[str, str]
    """Names and texts of special tokens (bos_token, ...), which chat templates use."""

    def encode(self, text: str) -> list[int]:
        """Encode one text, without a separator or other special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Encode many texts at once, which is faster than one by one."""

    def encode_batch_with_offsets(self, texts: Sequence[str]) -> list[tuple[Ids, Ids]]:
        """As `encode_batch`, with each token's first and last + 1 character: `[tokens, 2]`.

        Raises:
            UserError: if this tokenizer does not know.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids; separators and invalid ids are skipped."""


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer: `bytes`, a tokenizer.json or its folder, or a Hub name.

    Local files take precedence; names that look like paths are never looked up on the Hub.

    Raises:
        UserError: for a missing or unreadable file, a tokenizer without an end-of-document token,
            or (HubError) a Hub name that cannot be loaded.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name).expanduser()
    if path.is_dir():
        path /= "tokenizer.json"
    if path.is_file():
        return FileTokenizer(name, path)
    if name.startswith((".", "/", "~")) or path.suffix == ".json" or name.count("/") > 1:
        raise UserError(
            f"data.tokenizer: there is no file {path}; "
            "give 'bytes', a tokenizer.json, a folder that holds one, or a Hub name"
        )
    return HubTokenizer(name)


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 as the separator."""

    name = "bytes"
    identity = "bytes"
    vocab_size = 257
    separator = 256
    chat_template: str | None = None

    def __init__(self) -> None:
        self.special_tokens: dict[str, str] = {}

    def encode(self, text: str) -> list[int]:
        """One id per byte."""
        return list(text.encode("utf-8", errors="replace"))

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """One id per byte, without a Python object for each."""
        encoded = (text.encode("utf-8", errors="replace") for text in texts)
        return [np.frombuffer(text, dtype=np.uint8).astype(np.int64) for text in encoded]

    def encode_batch_with_offsets(self, texts: Sequence[str]) -> list[tuple[Ids, Ids]]:
        """Each byte of a character has the offsets of that character."""
        found = []
        for text, ids in zip(texts, self.encode_batch(texts), strict=True):
            sizes = [len(character.encode("utf-8", errors="replace")) for character in text]
            first = np.repeat(np.arange(len(text)), sizes)
            found.append((ids, np.stack([first, first + 1], axis=1)))
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Decode; bytes that are not valid UTF-8 become U+FFFD."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


class FileTokenizer:
    """A tokenizer.json, loaded with the `tokenizers` library; does not need transformers."""

    def __init__(self, name: str, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            content = path.read_bytes()
            self._backend: tokenizers.Tokenizer = Backend.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises a bare Exception
            raise UserError(
                f"data.tokenizer: {path} is not a readable tokenizer.json: {_first_line(error)}"
            ) from None
        # A file saved for a classifier may truncate or pad; documents must stay unchanged.
        self._backend.no_truncation()
        self._backend.no_padding()
        vocab = self._backend.get_vocab()
        self.name = name
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.separator = _separator(path, vocab)
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        self.identity = f"tokenizer.json {digest} separator {self.separator}"
        self.chat_template, self.special_tokens = _chat_settings(path)

    def encode(self, text: str) -> list[int]:
        """Encode without the special tokens of the file's template."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Like `encode`, on all cores."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def encode_batch_with_offsets(self, texts: Sequence[str]) -> list[tuple[Ids, Ids]]:
        """Like `encode_batch`, with offsets as the library counts them."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [_with_offsets(encoding.ids, encoding.offsets) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text without special tokens."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))


class HubTokenizer:
    """A tokenizer from the Hub or its local cache, loaded with transformers."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            backend: transformers.PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                name, trust_remote_code=False
            )
        except Exception as error:  # network, name, access, format: all end here
            raise HubError(
                f"data.tokenizer: no file or folder is called '{name}', and the Hub does not give "
                f"it: {_first_line(error)}; check the name and the network, or use 'bytes' or a "
                "tokenizer.json"
            ) from None
        vocab = backend.get_vocab()
        separator = backend.eos_token_id
        if separator is None:
            raise UserError(
                f"data.tokenizer: '{name}' has no eos_token to put after a document; use another"
            )
        backend.model_max_length = 10**30  # no warning about documents beyond the model's length
        self._backend = backend
        self.name = name
        self.separator = int(separator)
        self.vocab_size = max(max(vocab.values()), self.separator) + 1
        digest = hashlib.blake2b(json.dumps(sorted(vocab.items())).encode(), digest_size=16)
        self.identity = f"hub {name} {digest.hexdigest()} separator {separator}"
        self.chat_template = _default_template(backend.chat_template)
        self.special_tokens = {k: str(v) for k, v in backend.special_tokens_map.items()}

    def encode(self, text: str) -> list[int]:
        """Encode without the special tokens of its template."""
        return list(self._backend(text, add_special_tokens=False)["input_ids"])

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Like `encode`, on all cores if the tokenizer is a fast one."""
        rows = self._backend(list(texts), add_special_tokens=False)["input_ids"]
        return [np.array(row, dtype=np.int64) for row in rows]

    def encode_batch_with_offsets(self, texts: Sequence[str]) -> list[tuple[Ids, Ids]]:
        """Of a fast tokenizer alone."""
        if not self._backend.is_fast:
            raise UserError(
                f"data.tokenizer: '{self.name}' is a slow tokenizer, which does not say where a token "
                "begins; use a fast one, or a chat template without {% generation %}"
            )
        rows = self._backend(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        return [
            _with_offsets(ids, offsets)
            for ids, offsets in zip(rows["input_ids"], rows["offset_mapping"], strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text without special tokens."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))


def _separator(path: Path, vocab: dict[str, int]) -> int:
    for token in (_content(_settings(path).get("eos_token")), *SEPARATORS):
        if token in vocab:
            return vocab[token]
    raise UserError(
        f"data.tokenizer: {path} has no token that ends a document: add one of "
        f"{', '.join(SEPARATORS)}, or a tokenizer_config.json beside it whose eos_token names yours"
    )


def _with_offsets(ids: list[int], offsets: list[tuple[int, int]]) -> tuple[Ids, Ids]:
    return np.array(ids, dtype=np.int64), np.array(offsets, dtype=np.int64).reshape(-1, 2)


def _settings(path: Path) -> dict[str, Any]:
    """What the tokenizer_config.json beside a tokenizer.json says; empty if there is none."""
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return {}
    try:
        settings: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        settings.get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"data.tokenizer: {config} is not readable: {error}") from None
    return settings


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token  # the older format


def _chat_settings(path: Path) -> tuple[str | None, dict[str, str]]:
    """The chat template and the special tokens beside a tokenizer.json."""
    settings, file = _settings(path), path.with_name("chat_template.jinja")
    named = {key: _content(value) for key, value in settings.items() if key.endswith("_token")}
    special = {key: token for key, token in named.items() if isinstance(token, str)}
    try:
        template = file.read_text(encoding="utf-8") if file.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.tokenizer: {file} is not readable: {error}") from None
    return template or _default_template(settings.get("chat_template")), special


def _default_template(found: Any) -> str | None:
    """A tokenizer has one template, or several by name, of which one is called default."""
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
