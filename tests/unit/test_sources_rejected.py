"""Sources of text that cannot be read are one line, which names the file."""

from pathlib import Path
from typing import Any

import pytest
from datasets.exceptions import DatasetGenerationError

from launch.errors import UserError
from tests.unit.test_sources import both, read, write_jsonl, write_parquet

REJECTED = {
    "missing_path": (["none.txt"], {}, r"there is no file or folder '.*none\.txt'"),
    "missing_folder": (["no/such/folder"], {}, "there is no file or folder"),
    "missing_in_glob": (["*.none"], {}, "no file matches"),
    "empty_folder": (["empty"], {}, r"the folder .*empty holds no \.txt"),
    "unknown_suffix": (["x.docx"], {}, r"x\.docx is none of \.txt"),
    "unknown_suffix_in_glob": (["x.d*"], {}, r"x\.docx is none of \.txt"),
    "broken_json": (["broken.jsonl"], {}, r"broken\.jsonl line 2 is no JSON"),
    "json_array": (["array.jsonl"], {}, r"array\.jsonl line 1 is a JSON list"),
    "broken_parquet": (["broken.parquet"], {}, r"broken\.parquet is no readable parquet"),
    "damaged_parquet": (["damaged.parquet"], {}, r"damaged\.parquet is not readable"),
    "not_utf8": (["good.txt", "latin.txt"], {}, r"latin\.txt is not readable as text.*utf-8"),
    "not_utf8_jsonl": (["latin.jsonl"], {}, r"latin\.jsonl is not readable as text.*utf-8"),
    "json_field": (["good.jsonl"], {"text_field": "contents"}, "did you mean 'content'"),
    "parquet_field": (["good.parquet"], {"text_field": "txet"}, "did you mean 'text'"),
    "no_such_field": (["good.parquet"], {"text_field": "zzz"}, "choose from: text, number"),
    "not_text": (["good.parquet"], {"text_field": "number"}, "'number' of .* row 0 is int"),
    "subset": (["good.txt"], {"subset": "en"}, r"data\.subset: only Hub"),
    "split": (["good.txt"], {"split": "test"}, r"data\.split: only Hub"),
}


@both
@pytest.mark.parametrize("case", REJECTED)
def test_rejected(tmp_path: Path, case: str, streaming: bool) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "x.docx").write_text("x")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    write_jsonl(tmp_path / "array.jsonl", [["a"]])
    write_jsonl(tmp_path / "good.jsonl", [{"content": "a"}])
    good = Path(write_parquet(tmp_path / "good.parquet", {"text": ["a" * 99], "number": [1]}))
    content = good.read_bytes()
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1" + b"\xff" * 60 + content[64:])
    names, settings, message = REJECTED[case]
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, [str(tmp_path / name) for name in names], streaming=streaming, **settings)
    assert "\n" not in str(caught.value)


def test_a_full_disk_stays_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        try:
            Path("/dev/full").write_text("x")
        except OSError as error:
            raise DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr("datasets.load_dataset", fail)
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}])
    for source in (path, "some/set"):
        with pytest.raises(OSError, match="No space left"):
            read(tmp_path, source)


def test_an_empty_list_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the list is empty"):
        read(tmp_path, [])


@both
def test_a_hub_name_that_cannot_be_loaded_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data\.source: .*'no-such/set'.*split test") as caught:
        read(tmp_path, "no-such/set", split="test", streaming=streaming)
    assert "\n" not in str(caught.value)
