from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.data import prepare as module
from launch.data.token_file import SplitWriter, TokenFile
from tests.unit.test_prepare import all_ids, make, texts_in, write_rows


def test_sequences_overlap_by_the_token_that_is_only_predicted(tmp_path: Path) -> None:
    np.arange(47, dtype=np.uint16).tofile(tmp_path / "numbers.bin")
    numbers = TokenFile(tmp_path / "numbers.bin", "uint16")
    assert (len(numbers), numbers.sequences(4), numbers.sequences(46)) == (47, 11, 1)
    assert numbers.sequences(47) == 0
    assert numbers.read(0, 4).tolist() == [0, 1, 2, 3, 4]
    assert numbers.read(10, 4).tolist() == [40, 41, 42, 43, 44]
    assert numbers.read(0, 4).dtype == np.int64
    for index in (-1, 11):
        with pytest.raises(IndexError):
            numbers.read(index, 4)


def test_documents_are_packed_with_separators(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(200)]
    corpus = make(tmp_path, write_rows(tmp_path / "x.jsonl", texts), held_out=0.2)
    train, held_out = texts_in(corpus.train), texts_in(corpus.held_out)
    assert sorted(train + held_out) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]  # in order
    assert 20 < len(held_out) < 60
    assert corpus.documents == 200
    assert corpus.text_bytes == sum(map(len, texts))
    assert sorted(path.name for path in corpus.folder.iterdir()) == [
        "held_out.bin",
        "meta.json",
        "train.bin",
    ]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_document_is_on_its_side_whatever_the_others(tmp_path: Path, streaming: bool) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    names = [str(tmp_path / f"{i}.txt") for i in range(40)]
    settings: dict[str, Any] = {"held_out": 0.3, "streaming": streaming, "needed": 10_000}
    whole = set(texts_in(make(tmp_path, names, **settings).held_out))
    reordered = set(texts_in(make(tmp_path, names[::-1], **settings).held_out))
    half = set(texts_in(make(tmp_path, names[:20], **settings).held_out))
    assert whole == reordered
    assert half == {text for text in whole if int(text.split()[1]) < 20}


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_both_sides_have_a_document_where_there_are_two(tmp_path: Path, share: float) -> None:
    texts = ["first", "second one", "3"]
    corpus = make(tmp_path, write_rows(tmp_path / "x.jsonl", texts), held_out=share)
    train, held_out = texts_in(corpus.train), texts_in(corpus.held_out)
    assert sorted(train + held_out) == sorted(texts)
    assert len(held_out if share < 0.5 else train) == 1
    # The one that changed sides is chosen by its key, not by its place in the file.
    again = make(
        tmp_path, write_rows(tmp_path / "x.jsonl", [t[::-1] for t in texts]), held_out=share
    )
    assert texts_in(again.held_out) == [text[::-1] for text in held_out]


def test_moving_a_document_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.data.token_file.COPY_BYTES", 7)
    texts = [f"document {i}" * i for i in range(1, 9)]
    corpus = make(tmp_path, write_rows(tmp_path / "x.jsonl", texts), held_out=1e-9)
    (moved,) = texts_in(corpus.held_out)
    assert texts_in(corpus.train) == [text for text in texts if text != moved]
    # A larger share holds out the same document first.
    for share in (0.3, 0.5, 0.7):
        more = make(tmp_path, str(tmp_path / "x.jsonl"), held_out=share)
        assert moved in texts_in(more.held_out)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_one_document_is_cut_near_its_end(tmp_path: Path, share: float) -> None:
    text = "".join(map(chr, range(32, 131)))[:99]
    (tmp_path / "one.txt").write_text(text)
    corpus = make(tmp_path, str(tmp_path / "one.txt"), held_out=share)
    ids = [*text.encode(), 256]
    held_out = round(len(ids) * share)
    assert all_ids(corpus.train) == ids[:-held_out]
    assert all_ids(corpus.held_out) == ids[-held_out:]


def test_a_large_vocabulary_takes_four_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "x.jsonl", ["a", "b"])
    assert make(tmp_path, source).train._tokens.dtype == np.uint16
    monkeypatch.setattr("launch.data.tokenizer.ByteTokenizer.vocab_size", 2**16 + 1)
    monkeypatch.setattr("launch.data.tokenizer.ByteTokenizer.separator", 2**16)
    monkeypatch.setattr("launch.data.tokenizer.ByteTokenizer.identity", "large")
    corpus = make(tmp_path, source)
    assert sorted(all_ids(corpus.train) + all_ids(corpus.held_out)) == [97, 98, 2**16, 2**16]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_stream_ends_when_there_is_enough(tmp_path: Path, kind: str) -> None:
    texts = ["x" * 9] * 500
    source: str = write_rows(tmp_path / "x.jsonl", texts)
    if kind == "txt":
        source = str(tmp_path / "many")
        (tmp_path / "many").mkdir()
        for i, text in enumerate(texts):
            (tmp_path / "many" / f"{i}.txt").write_text(text)
    corpus = make(tmp_path, source, needed=2000, streaming=True, held_out=0.1)
    assert 2000 <= len(corpus.train) <= 4000
    assert len(corpus.held_out) >= 2000 * 0.1 / 0.9 - 10
    rare = make(tmp_path, source, needed=2000, streaming=True, held_out=1e-9)
    assert (len(rare.train), len(rare.held_out)) == (3990, 10)
    assert len(make(tmp_path, source, needed=2000).train) > 4500


def test_memory_stays_bounded_for_a_long_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    taken = 0

    def many() -> Iterator[tuple[str, str]]:
        nonlocal taken
        for i in range(1000):
            taken += 1
            yield str(i), "x" * 100

    class Counting(SplitWriter):
        def add(self, key: str, ids: Any) -> None:
            seen.append(taken - int(key))  # how far reading is ahead of writing
            super().add(key, ids)

    monkeypatch.setattr("launch.data.token_file.BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(module, "documents", lambda *arguments: many())
    monkeypatch.setattr(module, "SplitWriter", Counting)
    corpus = make(tmp_path, write_rows(tmp_path / "x.jsonl", ["unused"]))
    assert corpus.documents == 1000
    assert max(seen) <= 10
