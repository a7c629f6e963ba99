"""scripts/trace_pipeline.py: what it says about a pipeline is what its stages did."""

import contextlib
import csv
import io
import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launch.paths import ROOT
from launch.perf.pipeline_trace import SavedBytes
from launch.perf.trace_events import Event, ScheduleRun, idle_shares, peak_live, span
from models.pipeline_stages import micro_batches_alive, micro_batches_waiting
from scripts import trace_pipeline
from tests.cli.commands import run_forked
from tests.ranks import forked_local_ranks

SMALL = [
    "model.layers=2", "model.hidden=32", "data.sequence_length=32", "train.micro_batch_size=2",
    "train.global_batch_size=6",
]  # fmt: skip
# Passes of three micro batches in their order on each of two stages: arXiv:1811.06965, 2104.04473.
ORDER = {
    "1f1b": ["F1 F2 B1 F3 B2 B3", "F1 B1 F2 B2 F3 B3"],
    "zb-h1": ["F1 F2 B1 W1 F3 B2 W2 B3 W3", "F1 B1 F2 B2 W1 F3 B3 W2 W3"],  # arXiv:2401.10241
    "gpipe": ["F1 F2 F3 B1 B2 B3", "F1 F2 F3 B1 B2 B3"],
    "naive": ["F1 B1 F2 B2 F3 B3", "F1 B1 F2 B2 F3 B3"],
}
LIVE = {  # by the number of micro batches, on each of two stages
    "1f1b": {1: [1, 1], 3: [2, 1]},
    "zb-h1": {1: [1, 1], 3: [2, 1]},
    "gpipe": {1: [1, 1], 3: [3, 3]},
    "naive": {1: [1, 1], 3: [1, 1]},
}
TIE = 1e-3  # microseconds: what a number in JSON loses


def words(recipe: str, *more: str) -> list[str]:
    return ["--config", str(ROOT / "recipes" / f"{recipe}.yaml"), *more]


@dataclass
class Output:
    printed: str
    folder: Path
    rows: list[dict[str, str]]
    events: list[dict[str, Any]]

    def lanes(self) -> dict[tuple[str, int], list[dict[str, Any]]]:
        """The boxes of each schedule and stage in the order of time."""
        found = defaultdict(list)
        for event in self.events:
            if event["ph"] == "X":
                found[event["args"]["schedule"], event["pid"]].append(event)
        return {lane: sorted(boxes, key=lambda box: box["ts"]) for lane, boxes in found.items()}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Output:
    folder = tmp_path_factory.mktemp("trace")
    given = ["--micro-batches", "3,1", "--steps", "2", "--out", str(folder), "--set", *SMALL]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("launch.runtime.local_launcher.run_local_ranks", forked_local_ranks)
        assert trace_pipeline.main(words("gpt_tiny_pp2_zero1", *given)) == 0
    with (folder / "bubble.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return Output(printed.getvalue(), folder, rows, events)


def test_it_prints_the_bubble_beside_the_ideal_one(output: Output) -> None:
    for word in ("schedule", "measured", "ideal", "idle, by stage", "live micro batches"):
        assert word in output.printed
    lines = [line.split() for line in output.printed.splitlines() if "%" in line]
    shown = {(words[1], int(words[3])): words[9] for words in lines}
    alone = dict.fromkeys([("1f1b", 1), ("gpipe", 1), ("naive", 1), ("naive", 3)], "50.0%")
    alone["zb-h1", 1] = "40.0%"
    assert shown == {**alone, ("1f1b", 3): "25.0%", ("gpipe", 3): "25.0%", ("zb-h1", 3): "10.0%"}
    assert "2 ranks, " in output.printed
    assert output.folder.joinpath("timeline.png").read_bytes().startswith(b"\x89PNG")


def test_stages_hold_as_many_micro_batches_as_their_schedule_says(output: Output) -> None:
    live = defaultdict(list)
    for row in output.rows:
        live[row["schedule"], int(row["micro_batches"])].append(int(row["live_micro_batches"]))
    assert live == {(name, m): found for name, by_m in LIVE.items() for m, found in by_m.items()}


def test_saved_bytes_grow_with_the_live_micro_batches(output: Output) -> None:
    saved = {
        (row["schedule"], row["micro_batches"], row["stage"]): int(row["saved_bytes"])
        for row in output.rows
    }
    for row in output.rows:
        one = saved["naive", "1", row["stage"]]
        assert one > 2 * 32 * 32 * 4, "less than one activation of the residual stream"
        found = saved[row["schedule"], row["micro_batches"], row["stage"]]
        live, m = int(row["live_micro_batches"]), int(row["micro_batches"])
        if micro_batches_waiting(row["schedule"], 2, int(row["stage"]), m):
            # Inputs of linear layers and the gradients of their outputs; of this model, about as much.
            assert 0.5 * one < found - one * live < one
        else:
            # On a CPU the labels of all micro batches lie in one tensor, which counts once.
            assert 0 <= one * live - found < 0.02 * one


def test_every_micro_batch_passes_each_stage_in_the_schedules_order(output: Output) -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for (schedule, _), boxes in sorted(output.lanes().items()):
        passes = [box["name"].split() for box in boxes if "Pass " in box["name"]]
        found[schedule].append(" ".join(f"{name[0]}{number}" for name, number in passes))
    assert found == ORDER


def test_boxes_of_a_stage_do_not_overlap(output: Output) -> None:
    lanes = output.lanes()
    assert len(lanes) == 2 * len(ORDER)
    for boxes in lanes.values():
        for before, after in pairwise(boxes):
            assert before["ts"] + before["dur"] <= after["ts"] + TIE


def test_stages_share_one_clock(output: Output) -> None:
    """A message arrives after it was sent: with a clock a rank, it would not."""
    lanes = output.lanes()
    for schedule in ORDER:
        first, second = (
            {box["name"]: (box["ts"], box["ts"] + box["dur"]) for box in lanes[schedule, stage]}
            for stage in range(2)
        )
        for number in (1, 2, 3):
            here, there = first[f"ForwardPass {number}"], second[f"ForwardPass {number}"]
            assert here[1] < first[f"SendActivation {number}"][0] + TIE < there[0] + TIE
            here, there = first[f"BackwardPass {number}"], second[f"BackwardPass {number}"]
            assert there[1] < second[f"SendGrad {number}"][0] + TIE < here[0] + TIE


def test_the_chrome_trace_is_well_formed(output: Output) -> None:
    names = {e["pid"]: e["args"]["name"] for e in output.events if e["name"] == "process_name"}
    assert names == {0: "stage 0", 1: "stage 1"}
    starts: dict[str, dict[str, Any]] = {}
    ends: dict[str, dict[str, Any]] = {}
    for event in output.events:
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["ph"] in ("X", "M", "s", "f")
        assert event["ts"] >= 0
        assert event["ph"] != "X" or event["dur"] > 0
        if event["ph"] in ("s", "f"):
            (starts if event["ph"] == "s" else ends)[event["id"]] = event
    assert len(starts) == len(ORDER) * 3 * 2, (
        "a message there and one back, a schedule and micro batch"
    )
    assert starts.keys() == ends.keys()
    for name, start in starts.items():
        assert {start["pid"], ends[name]["pid"]} == {0, 1}


def test_an_interleaved_pipeline(tmp_path: Path) -> None:
    """Each micro batch passes both chunks of both stages; messages go round."""
    given = ["--micro-batches", "4", "--steps", "1", "--out", str(tmp_path)]
    given += ["--set", "model.layers=4", *SMALL[1:]]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("launch.runtime.local_launcher.run_local_ranks", forked_local_ranks)
        assert trace_pipeline.main(words("gpt_tiny_pp2_interleaved_zero1", *given)) == 0
    rows = list(csv.DictReader((tmp_path / "bubble.csv").open(newline="")))
    # arXiv:2104.04473: (p - 1) / v of a micro batch, and 2 (p - s) - 1 + (v - 1) p passes alive.
    assert [float(row["ideal_bubble"]) for row in rows] == pytest.approx([1 / 9, 1 / 9])
    assert [row["live_micro_batches"] for row in rows] == ["5", "3"]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    boxes: dict[int, list[str]] = {0: [], 1: []}
    for event in sorted(events, key=lambda event: event["ts"]):
        if "Pass " in event["name"]:
            boxes[event["pid"]].append(event["name"])
    passes = {
        f"{n}Pass {m}, chunk {c}"
        for n in ("Forward", "Backward")
        for m in range(1, 5)
        for c in (0, 1)
    }
    assert set(boxes[0]) == set(boxes[1]) == passes
    assert boxes[0][:4] == [f"ForwardPass {m}, chunk {c}" for c in (0, 1) for m in (1, 2)]
    assert boxes[1][2:4] == ["ForwardPass 1, chunk 1", "BackwardPass 1, chunk 1"]
    ends = {kind: [e for e in events if e["ph"] == kind] for kind in "sf"}
    # Of each micro batch: x from part 0 to 1, 2 and 3, and as many gradients back.
    assert len(ends["s"]) == len(ends["f"]) == 4 * 6


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        ("gpt_tiny_zero1", [], "use --config recipes/gpt_tiny_pp2_zero1.yaml, or --set parallel.pip"),
        ("gpt_tiny_pp2_zero1", ["--micro-batches", "4,0"], "--micro-batches: '4,0' is no list of"),
        ("gpt_tiny_pp2_zero1", ["--micro-batches", "some"], "--micro-batches: 'some' is no list of"),
        ("gpt_tiny_pp2_zero1", ["--schedules", "1f1b,zb"], "--schedules: no schedule 'zb'; they are 1f1b,"),
        (
            "gpt_tiny_pp2_zero1", ["--schedules", "zb-h1", "--set", "train.compile=true"],
            "train.compile: a compiled block's backward pass computes all its gradients at once",
        ),
        (
            "gpt_tiny_pp2_zero1", ["--schedules", "interleaved"],
            "parallel.model_chunks: the interleaved schedule runs 2 or more on each stage, others 1",
        ),
        (
            "gpt_tiny_pp2_interleaved_zero1", ["--schedules", "1f1b"],
            "this is 2 with 1f1b; use parallel.schedule=interleaved parallel.model_chunks=2, or take",
        ),
        (
            "gpt_tiny_pp2_interleaved_zero1", ["--micro-batches", "2,3"],
            "--micro-batches: 3 is no multiple of the 2 stages, as interleaved needs; write for example",
        ),
        ("gpt_tiny_pp2_zero1", ["--steps", "0"], "--steps: 0 is too few; use 1 or more"),
        ("gpt_tiny_pp2_zero1", ["--ranks", "3"], "parallel: 3 ranks are no multiple of tensor 1 x"),
    ],
)  # fmt: skip
def test_it_refuses_in_one_line(recipe: str, more: list[str], message: str) -> None:
    done = run_forked([ROOT / "scripts/trace_pipeline.py", *words(recipe, *more)])
    assert done.code == 2
    assert message in done.error()


def by_hand(*rows: str) -> list[list[Event]]:
    """A step drawn as in models/pipeline_schedules.py: a letter lasts a second, and `r` is a receive."""
    kinds = {"r": "RecvActivation", "o": "OptimizerStep"}
    stages = []
    for row in rows:
        events = []
        for second, sign in enumerate(row):
            kind = kinds.get(sign, "ForwardPass" if sign.isdigit() else "BackwardPass")
            if sign != ".":
                events.append(Event(kind, None, None, 100.0 + second, 101.0 + second))
        stages.append(events)
    return stages


def test_the_bubble_of_a_timeline_by_hand() -> None:
    gpipe = by_hand("1234r...ABCDo", "r1234..ABCDro", "r.1234ABCDroo")
    assert span(gpipe) == (100.0, 112.0), "the optimizer is no part of it"
    # 4 of 12 seconds a stage: the receives, the waiting and the other stages' passes are idle.
    assert idle_shares(gpipe) == pytest.approx([4 / 12] * 3)
    uneven = by_hand("12AB", "r1A.")
    assert idle_shares(uneven) == pytest.approx([0.0, 0.5])
    run = ScheduleRun("1f1b", 2, [uneven, uneven, by_hand("12..AB", "r1A...")], [0, 0])
    assert run.bubble() == pytest.approx(0.25)
    assert run.seconds() == pytest.approx(4.0)
    assert run.idle() == pytest.approx([0.0, 0.5])
    assert run.typical() is uneven


def test_live_micro_batches_of_a_timeline_by_hand() -> None:
    assert [peak_live(events) for events in by_hand("12A3B4CD", "1A2B3C4D", "1234ABCD")] == [
        2,
        1,
        4,
    ]
    assert [micro_batches_alive("1f1b", 4, stage, 3) for stage in range(4)] == [3, 3, 2, 1]


def test_saved_bytes_leave_out_parameters_and_end_with_the_backward_pass() -> None:
    layer = nn.Linear(8, 8)
    saved = SavedBytes(layer)
    losses = []

    def forward(_: object) -> None:
        x = torch.rand(4, 8)
        hidden = layer(x).relu()
        losses.append((hidden * hidden).sum())

    for _ in range(2):
        saved.watched(forward)(None)
    one = 2 * 4 * 8 * 4  # x for the weight's gradient; the hidden state, however often it is used
    assert saved.live == 2 * one
    losses[0].backward()
    assert saved.live == one
    losses[1].backward()
    assert (saved.live, saved.peak) == (0, 2 * one)
