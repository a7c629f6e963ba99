"""Chat data: which tokens count, against rows written by hand and against transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from launch.config.layout import Layout
from launch.config.schema import Data
from launch.data.batches import Batches, validation_set
from launch.data.conversations import ConversationFile, pack
from launch.data.prepare import Corpus, prepare
from launch.data.token_file import ANSWER, FIRST, FLAGS
from launch.errors import UserError
from launch.paths import ROOT
from models.parallel.grid import Grid
from tests.parity.conversations import CONVERSATIONS, example, write
from tests.unit.test_sources import write_jsonl, write_parquet
from tests.unit.test_tokenizer import train_tokenizer

CHATML = ROOT / "recipes" / "chatml.jinja"
# Without a mark, an answer ends where the next message begins: with the line feed.
UNMARKED = CHATML.read_text().replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
# As Qwen3 does, of the last answer alone: "<think>" is not there when more messages follow.
CHANGES_BEHIND = UNMARKED.replace(
    "{%- else %}", "{%- if loop.last %}{{ 'thought' }}{%- endif %}{%- else %}", 1
)


def make(folder: Path, source: str, said: list[str] | None = None, **settings: Any) -> Corpus:
    values: dict[str, Any] = {
        "sequence_length": 240, "cache_dir": str(folder / "cache"), "format": "chat",
        "chat_template": str(CHATML), "held_out": 1e-9,
    } | settings  # fmt: skip
    say = (lambda line: None) if said is None else said.append
    return prepare(Data(source=source, **values), tokens_needed=1, say=say)


def conversations_in(corpus: Corpus, length: int) -> list[tuple[list[int], list[int]]]:
    """Ids of each document of the rows, and for each id whether it counts as a label."""
    found = []
    for part in (corpus.train, corpus.held_out):
        share = validation_set(part, length, part.sequences(length), 1)
        for row in share.micro_batches:
            assert row.positions is not None and row.loss_weights is not None
            starts = [i for i, position in enumerate(row.positions[0].tolist()) if position == 0]
            for start, end in zip(starts, [*starts[1:], length], strict=True):
                # The row's first token is no label; a document's is one, of what is before it.
                ids = [*row.tokens[0, start:end].tolist(), int(row.labels[0, end - 1])]
                counted = [0, *row.loss_weights[0, start:end].int().tolist()]
                if end < length:  # the label there is the next document's first token
                    assert counted.pop() == 0
                    ids.pop()
                found.append((ids, counted))
    return [(ids, counted) for ids, counted in found if set(ids) != {256}]  # padding


def test_rows_hold_the_conversations_as_written_by_hand(tmp_path: Path) -> None:
    said: list[str] = []
    corpus = make(tmp_path, write(tmp_path / "chat.jsonl", CONVERSATIONS), said)
    assert [type(part) for part in (corpus.train, corpus.held_out)] == [ConversationFile] * 2
    expected = [example(turns) for turns in CONVERSATIONS]
    wanted = [(each.ids, [0, *each.answer[1:]]) for each in expected]
    assert sorted(conversations_in(corpus, 240)) == sorted(wanted)
    assert "7 conversations in 4 rows of 240, 81% full; 0 lost" in said[-1]


def test_every_rank_knows_how_many_labels_a_step_counts(tmp_path: Path) -> None:
    corpus = make(tmp_path, write(tmp_path / "chat.jsonl", CONVERSATIONS), sequence_length=170)
    batches = Batches(corpus.train, 170, 4, seed=3)
    for step in range(5):
        for data in (1, 2, 4):
            plan = Layout(Grid(data=data), 1, 4 // data)
            shares = [batches.rank_batch(step, plan, rank) for rank in range(data)]
            counted = sum(float(s.loss_weights.sum()) for s in shares if s.loss_weights is not None)
            assert {share.total_weight for share in shares} == {counted}
    assert len({float(batches.rank_batch(step, plan, 0).total_weight) for step in range(5)}) > 1


def test_an_unmarked_template_is_rendered_up_to_each_answer(tmp_path: Path) -> None:
    (tmp_path / "plain.jinja").write_text(UNMARKED)
    source = write(tmp_path / "chat.jsonl", CONVERSATIONS)
    corpus = make(tmp_path, source, chat_template=str(tmp_path / "plain.jinja"))
    wanted = []
    for turns in CONVERSATIONS:
        ids, answer = example(turns)
        with_feed = [int(a or (i > 0 and answer[i - 1] == 1)) for i, a in enumerate(answer)]
        # Before a first message that is an answer, the template renders nothing to answer to.
        if turns[0][0] == "assistant":
            with_feed[: len("<|im_start|>assistant\n")] = [1] * len("<|im_start|>assistant\n")
        wanted.append((ids, [0, *with_feed[1:]]))
    assert sorted(conversations_in(corpus, 240)) == sorted(wanted)


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_marked_template_counts_what_transformers_counts(tmp_path: Path, as_folder: bool) -> None:
    """With merges across the mark, accents and an emoji; the template beside the tokenizer or given."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    train_tokenizer(tmp_path / "tokenizer.json", marks)
    turns = [*CONVERSATIONS, [("user", "a"), ("assistant", "\n\n x = 1\n")], CONVERSATIONS[1]]
    template = CHATML.read_text()
    settings: dict[str, Any] = {"chat_template": str(CHATML)}
    if as_folder:
        template = "{{ bos_token }}" + template
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": "<|endoftext|>", "chat_template": template})
        )
        settings = {"chat_template": None}
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<|endoftext|>"
    )
    wanted = []
    for turn in turns:
        messages = [{"role": role, "content": content} for role, content in turn]
        both = theirs.apply_chat_template(
            messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
        )
        ids, mask = list(both["input_ids"]), list(both["assistant_masks"])
        wanted.append((ids, [0, *mask[1:]]))
    source = write(tmp_path / "chat.jsonl", turns)
    corpus = make(tmp_path, source, tokenizer=str(tmp_path / "tokenizer.json"), **settings)
    found = []
    for part in (corpus.train, corpus.held_out):
        values = np.fromfile(part.path, dtype=part._tokens.dtype)
        for each in np.split(values, np.flatnonzero(values & FIRST)[1:]):
            found.append(((each // FLAGS).tolist(), (each & ANSWER).tolist()))
    assert sorted(found) == sorted(wanted)


def test_what_is_beyond_a_row_is_cut_and_counted(tmp_path: Path) -> None:
    said: list[str] = []
    corpus = make(tmp_path, write(tmp_path / "c.jsonl", CONVERSATIONS), said, sequence_length=63)
    expected = [example(turns) for turns in CONVERSATIONS]
    wanted = [(each.ids[:64], [0, *each.answer[1:64]]) for each in expected]
    kept = [w for w in wanted if any(w[1])]
    assert sorted(conversations_in(corpus, 63)) == sorted(kept)
    assert len(kept) < len(wanted), "one has no answer in its first 64 tokens"
    assert "are left out, as no answer begins before that" in said[-1]


def test_a_template_that_changes_what_it_wrote_is_rejected_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "changing.jinja").write_text(CHANGES_BEHIND)
    rows = [CONVERSATIONS[0], CONVERSATIONS[1], CONVERSATIONS[2]]
    with pytest.raises(
        UserError, match=r"chat\.jsonl line 3: up to an answer this template"
    ) as error:
        make(
            tmp_path, write(tmp_path / "chat.jsonl", rows),
            chat_template=str(tmp_path / "changing.jinja"),
        )  # fmt: skip
    assert "\n" not in str(error.value)


GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
BAD: dict[str, tuple[Any, str]] = {
    "no list": ({"messages": "a"}, r"x\.jsonl line 2 has a str there, not a list of messages"),
    "empty": ({"messages": []}, r"line 2 has an empty list there"),
    "null": ({"messages": None}, r"line 2 has nothing there"),
    "no object": ({"messages": ["a"]}, r"line 2: message 1 is a str, not an object"),
    "no role": ({"messages": [{"content": "a"}]}, r"line 2: the role of message 1 is nothing"),
    "no text": (
        {"messages": [*GOOD["messages"], {"role": "user", "content": [{"text": "a"}]}]},
        r"line 2: the content of message 3 is a list, not text",
    ),
    "no answer": (
        {"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]},
        r"line 2: no message has the role assistant \(only human, gpt\)",
    ),
    "no column": (
        {"message": []},
        r"data\.messages_field: .*line 2 has no 'messages'; did you mean",
    ),
    "no row": ([1], r"line 2 is a JSON list"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_row_that_is_no_conversation_is_rejected_with_its_line(tmp_path: Path, kind: str) -> None:
    row, message = BAD[kind]
    with pytest.raises(UserError, match=message) as error:
        make(tmp_path, write_jsonl(tmp_path / "x.jsonl", [GOOD, row, GOOD]))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("*/meta.json"))


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no template": (
        {"chat_template": None},
        r"data\.chat_template: the tokenizer bytes has no chat",
    ),
    "no file": ({"chat_template": "none.jinja"}, r"data\.chat_template: cannot read .*none\.jinja"),
    "no Jinja": (
        {"chat_template": "bad.jinja"},
        r"does not render .*x\.jsonl line 1: .*unknown tag",
    ),
    "it raises": ({"chat_template": "no.jinja"}, r"does not render .*line 1: roles must alternate"),
    "no part": (
        {"chat_template": "empty.jinja"},
        r"no part of .*line 1 is between .% generation %.",
    ),
    "text files": ({"source": "x.txt"}, r"data\.format: chat reads jsonl, json and parquet"),
    "one row": ({"source": "one.jsonl"}, r"one\.jsonl has one conversation"),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_that_do_not_fit_are_rejected(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jinja").write_text("{% what %}")
    Path("no.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    Path("empty.jinja").write_text("{% generation %}{% endgeneration %}{{ messages[0].content }}")
    Path("x.txt").write_text("a")
    write_jsonl(Path("one.jsonl"), [GOOD])
    write_jsonl(Path("x.jsonl"), [GOOD, GOOD])
    settings, message = SETTINGS[kind]
    with pytest.raises(UserError, match=message) as error:
        make(tmp_path, **{"source": "x.jsonl", **settings})
    assert "\n" not in str(error.value)


def test_tokens_are_kept_until_template_or_format_changes(tmp_path: Path) -> None:
    source, said = write(tmp_path / "chat.jsonl", CONVERSATIONS), list[str]()
    (tmp_path / "mine.jinja").write_text(CHATML.read_text())
    first = make(tmp_path, source).folder
    assert make(tmp_path, source, chat_template=str(tmp_path / "mine.jinja")).folder == first
    assert make(tmp_path, source, said, sequence_length=999).folder == first
    assert [line.split()[0] for line in said] == ["data:"]
    (tmp_path / "mine.jinja").write_text(CHATML.read_text() + " ")
    assert make(tmp_path, source, chat_template=str(tmp_path / "mine.jinja")).folder != first


def test_parquet_and_json_hold_conversations_too(tmp_path: Path) -> None:
    messages = [
        [{"role": role, "content": content} for role, content in turns] for turns in CONVERSATIONS
    ]
    messages[0][0]["name"] = "ann"  # in parquet, the other messages then have a name of None
    (tmp_path / "chat.json").write_text(json.dumps([{"talk": each} for each in messages]))
    expected = sorted(
        (each.ids, [0, *each.answer[1:]]) for each in (example(turns) for turns in CONVERSATIONS)
    )
    for source in (
        write_parquet(tmp_path / "chat.parquet", {"talk": messages, "id": list(range(8))}),
        str(tmp_path / "chat.json"),
    ):
        corpus = make(tmp_path, source, messages_field="talk")
        assert sorted(conversations_in(corpus, 240)) == expected


def test_each_item_is_packed_once_into_the_fullest_row_that_takes_it() -> None:
    assert pack([5, 7, 3, 2, 9, 1], 10) == [[0, 3], [1, 2], [4, 5]]
    lengths = np.random.default_rng(0).integers(1, 33, 500).tolist()
    rows = pack(lengths, 32)
    assert sorted(item for row in rows for item in row) == list(range(500))
    assert max(sum(lengths[item] for item in row) for row in rows) <= 32
    assert len(rows) < 1.08 * sum(lengths) / 32
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


def test_padding_counts_nothing_and_sees_no_conversation(tmp_path: Path) -> None:
    corpus = make(tmp_path, write(tmp_path / "chat.jsonl", CONVERSATIONS), sequence_length=600)
    (row,), _ = validation_set(corpus.held_out, 600, 1, 1)
    length = len(example(CONVERSATIONS[6]).ids)
    assert row.positions is not None and row.loss_weights is not None
    assert row.positions[0, length:].tolist() == list(range(600 - length))
    assert torch.all(row.tokens[0, length:] == 256)
    assert float(row.loss_weights[0, length - 1 :].sum()) == 0.0
