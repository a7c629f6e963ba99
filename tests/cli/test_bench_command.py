"""scripts/bench.py: rows train the same, or have no speed; what it says, writes and rejects."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.errors import UserError
from launch.paths import ROOT
from scripts import bench as command
from tests.ranks import RankDiedError, run_ranks

SMALL = [
    "train.global_batch_size=8", "train.micro_batch_size=2", "model.layers=2", "model.hidden=32",
    "data.sequence_length=32", "model.position=learned",
]  # fmt: skip


def arguments(*words: str) -> list[str]:
    recipe = str(ROOT / "recipes/gpt_tiny_zero2.yaml")
    return ["--config", recipe, "--ranks", "2", "--set", *SMALL, *words]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # peers compile; that is not what is tested here


def run(*words: str) -> int:
    few = ["--steps", "3", "--warmup", "1", "--rounds", "1"]
    return command.run(command.parse_arguments(arguments(*few, *words)))


@pytest.mark.usefixtures("uncompiled")
def test_rows_train_the_same_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One device, layer-wise in one process, the recipe, a lever, a row on fewer ranks, and a peer."""
    out = tmp_path / "rows.jsonl"
    levers = ["--lever", "micro-batch-half", "sequence-on", "compile-off"]
    peers = ["--peers", "fsdp2", "dtensor"]
    clipped = "clipped: peer=raw_deepspeed json.gradient_clipping=1e-4"
    words = [*levers, "--row", "alone: ranks=1", "--row", clipped, *peers, "--out", str(out)]
    assert run("--layerwise", *words, "--profile", str(tmp_path / "profile")) == 0
    printed = capsys.readouterr()
    assert "left out: sequence-on: parallel.tensor is 1\n" in printed.err
    assert "left out: compile-off: the recipe has it already\n" in printed.err
    assert "left out: dtensor: it splits the layers over tensor ranks, and " in printed.err
    lines: dict[str, Any] = {
        line["row"]: line for line in map(json.loads, out.read_text().splitlines())
    }
    recipe = "ds_configs/zero2.json"
    rows = ["plain loop", "layer-wise", recipe, "micro-batch-half", "alone", "clipped", "fsdp2"]
    assert list(lines) == rows
    assert [line["ranks"] for line in lines.values()] == [1, 2, 2, 2, 1, 2, 2]
    other = lines["clipped"]
    assert (other["kind"], other["equal"]) == ("peer", False), "the JSON of that row clips"
    assert other["losses"][0] == pytest.approx(lines["plain loop"]["losses"][0], rel=1e-5)
    for name in ("layer-wise", recipe, "micro-batch-half", "alone", "fsdp2"):
        line = lines[name]
        assert line["equal"] is True, line
        assert line["losses"] == pytest.approx(lines["plain loop"]["losses"], rel=1e-5)
        assert line["tokens_per_second"] == pytest.approx(8 * 32 / line["seconds_per_step"])
        assert line["seconds_p10"] <= line["seconds_per_step"] <= line["seconds_p90"]
        assert line["memory_gib"] > 0.1
        assert line["mfu"] is None, "no peak is known of a CPU"
        assert line["flops_per_token_causal"] < line["flops_per_token"]
        assert {"torch", "deepspeed", "commit", "command", "device"} <= line.keys()
    assert lines["micro-batch-half"]["overrides"] == ["train.micro_batch_size=1"]
    for line in lines.values():
        for split in line["profile"]:
            assert sum(split["parts"].values()) == pytest.approx(split["wall"])
            assert split["parts"]["GEMM"] > 0 and split["launches"]["GEMM"] > 0
            one_process = line["kind"] in ("plain", "layerwise")
            assert ("communication" in split["launches"]) != one_process, line["row"]
    assert len(lines[recipe]["profile"]) == 2, "each rank's"
    assert (tmp_path / "profile" / "split.png").stat().st_size > 10_000
    assert len(list((tmp_path / "profile").glob("fsdp2-rank*.json.gz"))) == 2
    assert command.run(command.parse_arguments(["--table", str(out)])) == 0
    table = capsys.readouterr().out
    assert "| equal: " in table
    assert "| fsdp2, rank 1 |" in table
    assert f"| {lines[recipe]['tokens_per_second_per_rank']:,.0f} |" in table


@pytest.mark.matrix
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("layout", "peers"),
    [
        (["model.tied=false"], {"torch_compiled", "fsdp2", "raw_deepspeed", "hf_trainer"}),
        (["parallel.tensor=2"], {"dtensor"}),
        (["parallel.tensor=2", "parallel.sequence=true", "model.bias=false"], {"dtensor"}),
    ],
)
def test_peers_train_what_the_plain_loop_trains(
    layout: list[str], peers: set[str], tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    assert run("--peers", "--set", *layout, "train.schedule.warmup_steps=0", "--out", str(out)) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["row"] for line in lines if line["kind"] == "peer"} == peers
    for line in lines:
        assert line["kind"] == "plain" or line["equal"] is True, line


@pytest.mark.usefixtures("uncompiled")
def test_a_row_that_fails_is_a_line_and_a_known_plain_loop_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"

    errors = {4: RuntimeError("CUDA out of memory. Tried to allocate"), 1: RankDiedError("rank 1")}

    def crash(function: Any, world_size: int, *args: Any, **named: Any) -> Any:
        if error := errors.get(args[0]["train"]["micro_batch_size"]):
            raise error
        return run_ranks(function, world_size, *args, **named)

    monkeypatch.setattr("launch.perf.bench.run.run_ranks", crash)
    rows = ["--row", "mb4: train.micro_batch_size=4", "--row", "mb1: train.micro_batch_size=1"]
    assert run(*rows, "--out", str(out)) == 0
    assert "failed: out of memory" in capsys.readouterr().out
    lines = list(map(json.loads, out.read_text().splitlines()))
    failed = [None, None, "out of memory", "RankDiedError: rank 1"]
    assert [line["error"] for line in lines] == failed
    plain = lines[0]

    # The same with known losses, of which one is wrong.
    plain["losses"][2] *= 1.01
    known = tmp_path / "known.jsonl"
    known.write_text(json.dumps(plain) + "\n")
    assert run("--reference", str(known), "--out", str(out)) == command.EXIT_DIFFERENT
    said = capsys.readouterr()
    assert "plain loop: its losses are known from an earlier benchmark\n" in said.err
    (row,) = [text for text in said.out.splitlines() if "NOT EQUAL: " in text]
    assert "at step 3" in row
    assert row.split()[3:10] == ["-"] * 7, "what is not equal has no speed"
    assert len(out.read_text().splitlines()) == 5, "rows are appended"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layerwise", "--ranks", "1"], "--layerwise: it spreads the layers of a family gpt"),
        (["--layerwise", "--ranks", "4"], "--layerwise: 4 devices are more than the model's 2"),
        (["--steps", "0"], "--steps: 0 is too few; use 1 or more"),
        (["--ranks", "3"], "train.global_batch_size: 8 is no multiple of the data parallel"),
        (["--lever", "faster"], "--lever: 'faster' is not known; choose from: compile-on, "),
        (["--row", "train.micro_batch_size=4"], "--row .*: write NAME: KEY=VALUE KEY=VALUE"),
        (["--row", "a: train.micro_batch=4"], "--row a: .*unknown key train.micro_batch"),
        (["--row", "a: ranks=3"], "--row a: ranks=3: use 1 to 2, the number of --ranks"),
        (
            ["--row", "a: peer=jax"],
            "--row a: peer: 'jax' is not known; choose from: torch_compiled",
        ),
        (
            ["--row", "a: peer=dtensor"],
            "--row a: peer=dtensor: it splits the layers over tensor ranks",
        ),
        (
            ["--row", "a: json.compile.deepcompile=true"],
            "--row a: json.compile.deepcompile=true: add peer=raw_deepspeed, or write deepspeed.compile",
        ),
        (["--row", "a: peer=raw_deepspeed json.zero"], "--row a: json.zero: write json.KEY=VALUE"),
        (
            ["--profile", __file__],
            "--profile: .* cannot be made a folder: File exists; name another",
        ),
        (["--peers", "jax"], "--peers: 'jax' is not known; choose from: torch_compiled, "),
        (["--row", "a: ", "--row", "a: "], "--row: two rows are called 'a'"),
        (["--reference", "none.jsonl"], "none.jsonl: not readable: "),
        (["--set", "model.dropout=0.1"], "model.dropout: it is 0.1, and each rank draws a mask"),
    ],
)
def test_it_refuses(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command.run(command.parse_arguments(arguments(*words)))


def test_a_recipe_is_needed() -> None:
    with pytest.raises(UserError, match="--config: name a recipe to time"):
        command.run(command.parse_arguments([]))
