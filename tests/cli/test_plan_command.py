"""scripts/plan.py: what it says, writes and rejects; and the check before training."""

import json
from pathlib import Path

import pytest

from launch.config.layout import plan_layout
from launch.config.load import load_recipe
from launch.config.resolve import resolve
from launch.errors import UserError
from launch.memory.estimate import estimate
from launch.paths import ROOT
from launch.planner import fit_check
from launch.planner.cards import CARDS, card_of
from launch.planner.fit_check import card_named, check_fits
from launch.planner.model_input import recipe_for
from launch.planner.search import Cluster
from scripts import plan
from scripts.plan import parse_arguments

INLINE = ["--layers", "2", "--hidden", "64", "--heads", "4", "--vocab", "512", "--sequence", "128"]
INLINE += ["--global-batch", "16"]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    plan.run(parse_arguments(list(words)))
    return capsys.readouterr().out


def test_a_model_that_plain_data_parallelism_cannot_hold(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name = tmp_path / "mine"
    words = ["--model", "gpt_6b7", "--gpus", "4", "--gpu-memory", "80", "--global-batch", "64"]
    found = json.loads(printed(capsys, *words, "--json", "--rows", "3"))
    assert found["advice"].startswith("Plain data parallelism does not fit")
    times = [sum(each["seconds"].values()) for each in found["plans"]]
    assert times == sorted(times) and all(each["fits"] for each in found["plans"])
    assert "written: " in printed(capsys, *words, "--write", str(name))
    recipe = load_recipe(name.with_suffix(".yaml"))
    layout = plan_layout(recipe, 4)
    best = found["plans"][0]
    assert recipe.parallel.model_dump() == best["parallel"]
    memory = estimate(recipe, layout, resolve(recipe, layout))
    assert memory.parts.total == max(stage["bytes"] for stage in best["stages"])
    with pytest.raises(UserError, match="exists"):
        plan.run(parse_arguments([*words, "--write", str(name)]))


def test_a_small_model_needs_no_more_than_data_parallelism(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "memory.png"
    words = [*INLINE, "--gpus", "2", "--method", "lesson", "--picture", str(picture)]
    out = printed(capsys, *words)
    assert out.startswith("Plain data parallelism is enough") and "rule of thumb" in out
    assert picture.stat().st_size > 1000


def test_a_transformers_configuration_is_the_same_model(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    values = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 32, "hidden_size": 4096,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
        "vocab_size": 128256, "max_position_embeddings": 8192,
    }  # fmt: skip
    file.write_text(json.dumps(values))
    from launch.planner.model_size import model_size

    ours = recipe_for(None, "llama3_8b", {}, [], 2048, None)
    assert model_size(recipe_for(None, str(file), {}, [], 2048, None)) == model_size(ours)
    file.write_text(json.dumps({**values, "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(UserError, match="BertForMaskedLM; memory can be planned for GPT2LMHead"):
        recipe_for(None, str(file), {}, [], 2048, None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "gpt_6b8"], "did you mean '6b7'"),
        (["--model", "1b3", "--gpus", "0"], "--gpus: 0 is too few"),
        (["--model", "1b3", "--gpu", "h101"], "did you mean 'h100'"),
        (["--layers", "4"], "--hidden: the model has no hidden"),
        ([*INLINE, "--heads", "5"], "not a multiple of heads 5"),
        (["--config", "recipes/hf_qwen3_0b6_zero2.yaml"], "give its config.json as --model"),
        (["--model", "6b7", "--gpu-memory", "24", "--host-memory", "32"], "GPUs would do: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line(words: list[str], says: str) -> None:
    with pytest.raises(UserError) as error:
        plan.run(parse_arguments(words))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_training_stops_before_it_starts_where_memory_is_too_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = load_recipe(ROOT / "recipes" / "gpt_1b3_zero1.yaml", ["train.global_batch_size=16"])
    check_fits(recipe, Cluster(CARDS["h200"], 2))
    small = Cluster(card_of("h100", 30), 2)
    with pytest.raises(
        UserError, match=r"needs .* GiB .* more than the 30.0 .* what fits is .*--set"
    ):
        check_fits(recipe, small)
    # The same line ends a run whose memory ran out; without a GPU, the error stays as it is.
    error = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(RuntimeError, match="Tried"):
        fit_check.after_out_of_memory(recipe, error)
    monkeypatch.setattr(fit_check, "found_cluster", lambda: small)
    with pytest.raises(UserError, match=r"out of memory: CUDA .* what fits is"):
        fit_check.after_out_of_memory(recipe, error)


def test_a_card_is_known_by_its_drivers_name() -> None:
    card = card_named("NVIDIA H200", 139.8)
    assert card.memory_tbs == CARDS["h200"].memory_tbs and card.gib == 139.8
    assert card_named("Some GPU", 10.0).tflops == CARDS["a100"].tflops
