import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from launch.data.tokenizer import load_tokenizer
from launch.errors import UserError

TEXT = "def f(x):\n    return x  # naïve 🐍\n"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def train_tokenizer(path: Path, special: list[str]) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [TEXT] * 5,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet),
    )
    backend.save(str(path))
    return backend


def test_bytes_round_trip_and_leave_separators_out() -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(TEXT)
    assert (tokenizer.vocab_size, tokenizer.separator) == (257, 256)
    assert ids == list(TEXT.encode())
    assert [row.tolist() for row in tokenizer.encode_batch([TEXT, ""])] == [ids, []]
    assert tokenizer.decode([256, *ids, 256, 300]) == TEXT
    assert tokenizer.decode([0xC3, 65]) == "�A"


@pytest.mark.parametrize("as_folder", [True, False])
def test_tokenizer_json_round_trips(tmp_path: Path, as_folder: bool) -> None:
    train_tokenizer(tmp_path / "tokenizer.json", ["<pad>", "<|endoftext|>"])
    name = str(tmp_path if as_folder else tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(TEXT)
    assert (tokenizer.name, tokenizer.separator) == (name, 1)
    assert len(ids) < len(TEXT.encode())
    assert max(ids) < tokenizer.vocab_size <= 300
    assert [row.tolist() for row in tokenizer.encode_batch([TEXT, "x"])] == [
        ids,
        tokenizer.encode("x"),
    ]
    assert tokenizer.decode([*ids, tokenizer.separator]) == TEXT


def test_a_files_template_truncation_and_padding_do_not_touch_documents(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    backend = train_tokenizer(path, ["[CLS]", "[SEP]"])
    plain = load_tokenizer(str(path)).encode(TEXT)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(path))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.encode(TEXT) == plain
    assert tokenizer.encode_batch([TEXT])[0].tolist() == plain


@pytest.mark.parametrize("eos", ["<end>", {"content": "<end>", "lstrip": False}])
def test_tokenizer_config_names_the_separator(tmp_path: Path, eos: object) -> None:
    train_tokenizer(tmp_path / "tokenizer.json", ["</s>", "<end>"])
    assert load_tokenizer(str(tmp_path)).separator == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.separator == 1


def test_identity_follows_content_and_separator(tmp_path: Path) -> None:
    train_tokenizer(tmp_path / "tokenizer.json", ["</s>", "<end>"])
    first = load_tokenizer(str(tmp_path)).identity
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    second = load_tokenizer(str(tmp_path)).identity
    train_tokenizer(tmp_path / "tokenizer.json", ["</s>", "<end>", "<more>"])
    assert len({first, second, load_tokenizer(str(tmp_path)).identity}) == 3


def test_no_separator_is_rejected(tmp_path: Path) -> None:
    train_tokenizer(tmp_path / "tokenizer.json", [])
    with pytest.raises(UserError, match=r"tokenizer\.json has no token that ends a document"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", ["{", '{"version": "1.0"}', ""])
def test_a_broken_file_is_rejected(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json is not a readable tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_broken_config_is_rejected(tmp_path: Path) -> None:
    train_tokenizer(tmp_path / "tokenizer.json", ["</s>"])
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not readable"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["./none", "/no/such", "~/none", "none.json", "a/b/c"])
def test_what_looks_like_a_path_is_a_missing_file(name: str) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer: there is no file"):
        load_tokenizer(name)


def test_a_folder_without_tokenizer_json_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_hub_name_that_cannot_be_loaded_is_one_line() -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer: .*'no-such/tokenizer'") as caught:
        load_tokenizer("no-such/tokenizer")
    assert "\n" not in str(caught.value)


def test_a_hub_tokenizer_gives_what_its_file_gives(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from launch.data.tokenizer import HubTokenizer

    backend = train_tokenizer(tmp_path / "tokenizer.json", ["<|endoftext|>"])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", model_max_length=4
    ).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 4
    hub, local = HubTokenizer(str(tmp_path)), load_tokenizer(str(tmp_path))
    assert (hub.separator, hub.vocab_size) == (local.separator, local.vocab_size)
    assert hub.encode(TEXT) == local.encode(TEXT)
    assert hub.encode_batch([TEXT])[0].tolist() == local.encode(TEXT)
    assert hub.decode(hub.encode(TEXT)) == TEXT
