"""Conversations as tokens: rendered by a chat template, with the tokens of the answers marked.

A template (https://huggingface.co/docs/transformers/chat_templating) is a Jinja program that writes
messages as one text; transformers runs it in a sandbox. Only what the assistant says counts towards
the loss. Where that is in the text, a template says with `{% generation %}`; of one that does not,
the text is rendered up to each answer and up to its end, which have to be beginnings of the whole.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from launch.config.schema import Data
from launch.data.sources import Cell, without_surrogates
from launch.data.token_file import ANSWER, FIRST, FLAGS, SplitWriter
from launch.data.tokenizer import Ids, Tokenizer
from launch.errors import UserError
from launch.paths import ROOT

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASSISTANT = "assistant"
ROWS_A_CALL = 256  # of the tokenizer, which uses all cores
EXAMPLE = "recipes/chatml.jinja"

Messages: TypeAlias = list[dict[str, Any]]
Spans: TypeAlias = list[tuple[int, int]]


class Tokens(NamedTuple):
    """A conversation's ids, and whether each is part of an answer: both `[tokens]`."""

    ids: Ids
    answer: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template's text, and the special tokens that it may use by name."""

    text: str
    special_tokens: dict[str, str]

    @property
    def marks_answers(self) -> bool:
        """Whether it says which parts the assistant generates."""
        return MARKED.search(self.text) is not None

    def render(self, place: str, messages: Messages, prompt: bool = False) -> str:
        """The text of messages; with `prompt`, up to where the assistant's next answer begins.

        Raises:
            UserError: naming the place, if the template rejects the messages or fails.
        """
        text: str = self._render(place, messages, add_generation_prompt=prompt)[0][0]
        return text

    def render_marked(self, place: str, messages: Messages) -> tuple[str, Spans]:
        """The text, and the first and last + 1 character of each part inside `{% generation %}`."""
        (text,), (spans,) = self._render(place, messages, return_assistant_tokens_mask=True)
        return text, spans

    def _render(self, place: str, messages: Messages, **how: bool) -> Any:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            return render_jinja_template(
                conversations=[messages], chat_template=self.text, **how, **self.special_tokens
            )
        except Exception as error:  # of any type: the template is a program
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"data.chat_template: it does not render {place}: {reason[0]}; change the row, or "
                "name a template that takes it"
            ) from None


def load_template(data: Data, tokenizer: Tokenizer) -> ChatTemplate:
    """The template in `data.chat_template`, or else the tokenizer's own.

    Raises:
        UserError: if there is none, or the file is not readable.
    """
    if data.chat_template is None:
        if tokenizer.chat_template is None:
            raise UserError(
                f"data.chat_template: the tokenizer {data.tokenizer} has no chat template; set this "
                f"key to a file with one, for example {EXAMPLE}"
            )
        return ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    path = Path(data.chat_template).expanduser()
    path = path if path.is_absolute() or path.is_file() else ROOT / path
    try:
        return ChatTemplate(path.read_text(encoding="utf-8"), tokenizer.special_tokens)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"data.chat_template: cannot read {path} ({reason}); name a file with a Jinja template, "
            f"for example {EXAMPLE}"
        ) from None


def write_conversations(
    writer: SplitWriter,
    cells: Iterable[Cell],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    limit: int | None,
) -> int:
    """Tokenise conversations and write each one; the caller must call `writer.finish`.

    `limit`: stop at this many train tokens plus their held-out share; None for no limit. Returns the
    number of UTF-8 bytes of rendered text.

    Raises:
        UserError: naming the row that is no conversation, or that the template does not render.
    """
    from tqdm import tqdm

    text_bytes, rest = 0, iter(cells)
    with tqdm(desc="tokenising", unit=" rows", disable=None, leave=False) as bar:
        while some := list(islice(rest, ROWS_A_CALL)):
            rows = [(place, check_messages(place, value)) for _, place, value in some]
            for (key, _, _), (tokens, size) in zip(
                some, tokenize(rows, tokenizer, template), strict=True
            ):
                writer.add(key, with_flags(tokens))
                text_bytes += size
                bar.update(1)
                if limit is not None and writer.enough(limit):
                    return text_bytes
    return text_bytes


def with_flags(tokens: Tokens) -> Ids:
    """Ids as the file holds them. The first of a conversation is never a label: nothing precedes it."""
    values: Ids = tokens.ids * FLAGS + tokens.answer * ANSWER
    values[:1] = tokens.ids[:1] * FLAGS + FIRST
    return values


def check_messages(place: str, value: Any) -> Messages:
    """The messages of a row, without the keys that parquet files fill up with nothing.

    Raises:
        UserError: unless they are a list of objects with a role and a text, one of them the
            assistant's.
    """
    if not isinstance(value, list) or not value:
        raise UserError(
            f"data.messages_field: {place} has {_kind(value)} there, not a list of messages "
            '[{"role": ..., "content": ...}, ...]; change the row, or name another column'
        )
    messages: Messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise UserError(
                f"data.source: {place}: message {number} is {_kind(message)}, not an object with role "
                "and content; change the row"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UserError(
                    f"data.source: {place}: the {key} of message {number} is "
                    f"{_kind(message.get(key))}, not text; change the row"
                )
        messages.append(
            {
                k: without_surrogates(v) if isinstance(v, str) else v
                for k, v in message.items()
                if v is not None
            }
        )
    if all(message["role"] != ASSISTANT for message in messages):
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
        raise UserError(
            f"data.source: {place}: no message has the role {ASSISTANT} (only {roles}), so there is "
            "nothing to learn; take the row out, or rename its roles"
        )
    return messages


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "nothing" if value is None else f"a {type(value).__name__}"


def tokenize(
    rows: list[tuple[str, Messages]], tokenizer: Tokenizer, template: ChatTemplate
) -> Iterator[tuple[Tokens, int]]:
    """Each row's tokens and the size of its text in bytes; a row is a place and its messages.

    Raises:
        UserError: naming the row in which the answers cannot be found.
    """
    if template.marks_answers:
        yield from _by_marks(rows, tokenizer, template)
    else:
        yield from _by_beginnings(rows, tokenizer, template)


def _by_marks(
    rows: list[tuple[str, Messages]], tokenizer: Tokenizer, template: ChatTemplate
) -> Iterator[tuple[Tokens, int]]:
    """A token that is in part an answer counts as one, as in transformers."""
    marked = [template.render_marked(place, messages) for place, messages in rows]
    encoded = tokenizer.encode_batch_with_offsets([text for text, _ in marked])
    for (place, _), (text, spans), (ids, offsets) in zip(rows, marked, encoded, strict=True):
        answer = np.zeros(len(ids), dtype=np.bool_)
        for first, end in spans:
            answer |= (offsets[:, 0] < end) & (offsets[:, 1] > first)
        if not answer.any():
            raise UserError(
                f"data.chat_template: no part of {place} is between {{% generation %}} and "
                "{% endgeneration %}; put what the assistant says there"
            )
        yield Tokens(ids, answer), len(text.encode())


def _by_beginnings(
    rows: list[tuple[str, Messages]], tokenizer: Tokenizer, template: ChatTemplate
) -> Iterator[tuple[Tokens, int]]:
    wholes = [template.render(place, messages) for place, messages in rows]
    answers: list[list[tuple[str, str]]] = []
    for place, messages in rows:
        turns = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
        answers.append(
            [
                (
                    template.render(place, messages[:i], prompt=True) if i else "",
                    template.render(place, messages[: i + 1]),
                )
                for i in turns
            ]
        )
    texts = dict.fromkeys([*wholes, *(text for row in answers for pair in row for text in pair)])
    ids_of = dict(zip(texts, tokenizer.encode_batch(list(texts)), strict=True))
    for (place, _), whole, pairs in zip(rows, wholes, answers, strict=True):
        ids = ids_of[whole]
        answer = np.zeros(len(ids), dtype=np.bool_)
        for before, through in pairs:
            first, end = len(ids_of[before]), len(ids_of[through])
            for text in (before, through):
                beginning = ids_of[text]
                if not np.array_equal(ids[: len(beginning)], beginning):
                    raise UserError(
                        f"data.chat_template: {place}: up to an answer this template renders other "
                        "tokens than it does of the whole conversation, so that where the answer "
                        "begins is not known; name a template that marks it with "
                        f"{{% generation %}}, for example {EXAMPLE}"
                    )
            answer[first:end] = True
        yield Tokens(ids, answer), len(whole.encode())
