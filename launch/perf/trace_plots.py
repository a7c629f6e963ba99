"""Output of `scripts/trace_pipeline.py`: two tables, a timeline, a Chrome trace and a CSV file."""

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from launch.perf.trace_events import (
    BACKWARD,
    FORWARD,
    WEIGHTS,
    Event,
    ScheduleRun,
    Stages,
    span,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB = 2**20
KINDS = {
    FORWARD: "forward", BACKWARD: "backward", WEIGHTS: "weights",
    "SendActivation": "send", "SendGrad": "send",
    "RecvActivation": "receive", "RecvGrad": "receive",
    "ReduceTiedGrads": "optimizer", "ReduceGrads": "optimizer", "OptimizerStep": "optimizer",
    "LoadMicroBatch": "load", "KeepLoss": "loss", "TakeLoss": "loss",
}  # fmt: skip
# Okabe and Ito's colour-blind-safe palette.
COLOURS = {
    "forward": "#56B4E9", "backward": "#E69F00", "weights": "#F0E442", "send": "#009E73",
    "receive": "#CC79A7", "optimizer": "#666666",
}  # fmt: skip
MEANING = {
    "forward": "forward pass of a micro batch (its number; later model chunks are lighter)",
    "backward": "backward pass; of zb-h1, the gradients of inputs",
    "weights": "weight pass: the gradients of weights",
    "send": "send, with waiting for the receiver",
    "receive": "receive, with waiting for the sender",
    "optimizer": "gradient reduction and optimizer, with waiting for other stages",
}
MESSAGES = {"SendActivation": "RecvActivation", "SendGrad": "RecvGrad"}
IDLE: dict[str, Any] = {"facecolor": "white", "edgecolor": "#AAAAAA", "hatch": "////"}
END: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 1.2}
NARROW = 0.008  # share of the plot's width below which a number does not fit in its box


def bubble_table(runs: list[ScheduleRun]) -> Table:
    """Measured and ideal bubble of every run, with the idle share of each stage."""
    stages = len(runs[0].saved_bytes)
    shown = Table(title="bubble: the idle share of a step", title_justify="left")
    columns = ("schedule", "micro batches m", "ms a step", "measured", "ideal", "idle, by stage")
    for name in columns:
        shown.add_column(name, justify="left" if name == "schedule" else "right", no_wrap=True)
    most = max(run.micro_batches for run in runs)
    order = [run.schedule for run in runs]
    for run in sorted(runs, key=lambda run: order.index(run.schedule)):
        shown.add_row(
            run.schedule,
            str(run.micro_batches),
            f"{1000 * run.seconds():.1f}",
            f"{run.bubble():.1%}",
            f"{run.ideal():.1%}",
            " ".join(f"{share:.0%}" for share in run.idle()),
            end_section=run.micro_batches == most,
        )
    shown.caption = (
        f"p = {stages} stages; ideal: (p-1)/(m+p-1) for 1f1b and gpipe, (p-1)/(v m+p-1) for interleaved "
        "with v model chunks, (p-1)/p for naive, (p-1)/(3m+p-1) for zb-h1 from m = p on, if its passes "
        "take equally long. A step: from the first instruction to the last pass; medians over the steps. "
        "Idle: not in a pass. Gradient reduction and optimizer come after, and do not count"
    )
    shown.caption_justify = "left"
    return shown


def live_table(runs: list[ScheduleRun]) -> Table:
    """Peak live micro batches and saved activations of every stage, at the largest m."""
    most = max(run.micro_batches for run in runs)
    shown = Table(title=f"peak live activations, m = {most}", title_justify="left")
    for name in ("schedule", "stage", "live micro batches", "expected", "saved for backward, MiB"):
        shown.add_column(name, justify="left" if name == "schedule" else "right", no_wrap=True)
    for run in runs:
        if run.micro_batches != most:
            continue
        rows = list(zip(run.live(), run.expected(), run.saved_bytes, strict=True))
        for stage, (live, expected, saved) in enumerate(rows):
            shown.add_row(
                run.schedule, str(stage), str(live), str(expected), f"{saved / MIB:.2f}",
                style="" if live == expected else "red", end_section=stage == len(rows) - 1,
            )  # fmt: skip
    shown.caption = (
        "live: forward pass done, backward pass not. Expected: min(p - stage, m) for 1f1b and zb-h1, m for "
        "gpipe, 1 for naive; for interleaved 2(p - stage) - 1 + (v-1)p passes of a chunk, v m at most. "
        "Saved: what autograd keeps at a time, and what waits for weight passes, without parameters"
    )
    shown.caption_justify = "left"
    return shown


def write_csv(runs: list[ScheduleRun], file: Path) -> None:
    """One row per schedule, number of micro batches and stage."""
    with file.open("w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(
            ("schedule", "micro_batches", "seconds", "bubble", "ideal_bubble", "stage", "idle",
             "live_micro_batches", "expected_live", "saved_bytes")
        )  # fmt: skip
        for run in runs:
            whole = (run.schedule, run.micro_batches, run.seconds(), run.bubble(), run.ideal())
            parts = zip(run.idle(), run.live(), run.expected(), run.saved_bytes, strict=True)
            rows.writerows((*whole, stage, *part) for stage, part in enumerate(parts))


def write_chrome(runs: list[ScheduleRun], file: Path) -> None:
    """The typical step of each run in Chrome's trace format.

    Stages are processes, schedules are their threads, and every step begins at 0. Times are in
    microseconds. Arrows lead from a send to its receive.
    """
    events: list[dict[str, Any]] = []
    for thread, run in enumerate(runs):
        stages = run.typical()
        begin, _ = span(stages)
        for stage, instructions in enumerate(stages):
            place = {"pid": stage, "tid": thread}
            for kind, name in (("process", f"stage {stage}"), ("thread", run.schedule)):
                events.append(
                    {"ph": "M", "name": f"{kind}_name", "args": {"name": name}, **place, "ts": 0}
                )
            for event in instructions:
                kind = KINDS[event.instruction]
                events.append(
                    {
                        "ph": "X",
                        "name": _name(event, run.model_chunks),
                        "cat": kind,
                        "ts": (event.start - begin) * 1e6,
                        "dur": (event.end - event.start) * 1e6,
                        "args": {
                            "schedule": run.schedule,
                            "instruction": event.instruction,
                            "micro_batch": event.micro_batch,
                            "chunk": event.chunk,
                            "buffer": event.buffer,
                        },
                        **place,
                    }
                )
        events += _arrows(stages, run.schedule, thread, begin)
    file.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _name(event: Event, model_chunks: int) -> str:
    if event.micro_batch is None:
        return event.instruction
    chunk = f", chunk {event.chunk}" if model_chunks > 1 else ""
    return f"{event.instruction} {event.micro_batch}{chunk}"


def _arrows(stages: Stages, schedule: str, thread: int, begin: float) -> list[dict[str, Any]]:
    found = []
    where = {
        (stage, e.instruction, e.micro_batch, e.chunk): e
        for stage, events in enumerate(stages)
        for e in events
    }
    for (stage, instruction, number, chunk), sent in where.items():
        if instruction not in MESSAGES:
            continue
        # Round the ring, to the next chunk or the one before.
        way = 1 if instruction == "SendActivation" else -1
        rounds, other = divmod(stage + way, len(stages))
        received = where[other, MESSAGES[instruction], number, chunk + rounds]
        name = f"{schedule} {instruction} {stage} {number} {chunk}"
        for phase, pid, event in (("s", stage, sent), ("f", other, received)):
            # At the middle of its box, so that a viewer can match it to the box.
            found.append(
                {
                    "ph": phase, "id": name, "name": "message", "cat": "message", "bp": "e",
                    "pid": pid, "tid": thread,
                    "ts": ((event.start + event.end) / 2 - begin) * 1e6,
                }
            )  # fmt: skip
    return found


def save_picture(runs: list[ScheduleRun], title: str, file: Path) -> None:
    """Draw the typical step of each run, one below the other on the same time scale."""
    # Without pyplot, which also looks for a window system.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    stages = len(runs[0].saved_bytes)
    steps = [run.typical() for run in runs]
    width = max(_since(stages, e.end) for stages in steps for events in stages for e in events)
    height = 1.2 + len(runs) * (0.9 + 0.55 * stages)
    figure = Figure(figsize=(14, height), layout="constrained")
    panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False)
    for panel, run, step in zip(panels[:, 0], runs, steps, strict=True):
        _draw(panel, step, width, run.model_chunks)
        panel.set_title(
            f"{run.schedule}: p = {stages} stages, m = {run.micro_batches} micro batches; "
            f"bubble measured {run.bubble():.0%}, ideal {run.ideal():.0%}",
            loc="left",
        )
    panels[-1, 0].set_xlabel("milliseconds since the step's first instruction")
    boxes = [Patch(facecolor=colour, label=MEANING[kind]) for kind, colour in COLOURS.items()]
    boxes.insert(3, Patch(**IDLE, label="idle: the bubble"))
    line = Line2D([], [], label="end of the last pass, and of the bubble", **END)
    figure.legend(handles=[*boxes, line], loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def _since(stages: Stages, when: float) -> float:
    return (when - span(stages)[0]) * 1000


def _draw(panel: "Axes", stages: Stages, width: float, model_chunks: int) -> None:
    """One panel: a row per stage, passes as tall boxes on a hatched ground, the rest in a strip.

    Later model chunks are lighter.
    """
    from matplotlib.colors import to_rgb

    end = _since(stages, span(stages)[1])
    for stage, events in enumerate(stages):
        tall, strip = (stage - 0.36, 0.56), (stage + 0.23, 0.13)
        panel.broken_barh([(0, end)], tall, linewidth=0, **IDLE)
        for event in events:
            kind = KINDS[event.instruction]
            if kind not in COLOURS:
                continue
            start, stop = _since(stages, event.start), _since(stages, event.end)
            colour = COLOURS[kind]
            if kind in ("forward", "backward", "weights"):
                box = (start, stop - start)
                light = 0.6 * event.chunk / model_chunks
                filled = tuple(part + (1.0 - part) * light for part in to_rgb(colour))
                panel.broken_barh([box], tall, facecolor=filled, edgecolor="white", linewidth=0.6)
                if stop - start > NARROW * width:
                    place = ((start + stop) / 2, stage - 0.08)
                    panel.text(*place, str(event.micro_batch), ha="center", va="center", fontsize=9)
                continue
            panel.broken_barh([(start, stop - start)], strip, facecolor=colour)
            if kind == "optimizer" and stop > end:
                # Before the end a stage only waits in it for the others, and that is idle.
                box = (max(start, end), stop - max(start, end))
                panel.broken_barh([box], tall, facecolor=colour, edgecolor="white", linewidth=0.6)
    panel.axvline(end, **END)
    panel.set(xlim=(0, width), ylim=(len(stages) - 0.5, -0.5))
    panel.set_yticks(range(len(stages)), [f"stage {stage}" for stage in range(len(stages))])
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.tick_params(axis="y", length=0)
