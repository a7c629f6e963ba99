"""Tables of results: for a terminal, and as Markdown. What did not train the same has no speed there."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch.perf.bench.result import Line
from launch.perf.bench.run import is_wrong
from launch.perf.step_profile.split import PARTS

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "row", "ranks", "micro batch", "tokens/s per rank", "MFU", "causal", "s/step (p10 to p90)",
    "ratio, total", "ratio, a rank", "peak GiB", "losses: largest share of bound",
)  # fmt: skip
NONE = "-"
SPLIT_COLUMNS = (
    "milliseconds of a step", "wall", *PARTS, "communication beside computing", "launches"
)  # fmt: skip


def cells(line: Line, plain: Line | None) -> list[str]:
    """A row's cells, as text; the ratios are to `plain`'s tokens per second."""
    start = [str(line["row"]), str(line["ranks"]), str(line["micro_batch"])]
    if line.get("error"):
        return [*start, *[NONE] * 7, f"failed: {line['error']}"]
    if is_wrong(line):
        return [*start, *[NONE] * 7, verdict(line)]
    ratios = [NONE, NONE]
    if plain is not None and plain.get("tokens_per_second"):
        ratios = [
            f"{line[key] / plain[key]:.2f}"
            for key in ("tokens_per_second", "tokens_per_second_per_rank")
        ]
    seconds = [line[key] for key in ("seconds_per_step", "seconds_p10", "seconds_p90")]
    return [
        *start,
        f"{line['tokens_per_second_per_rank']:,.0f}",
        *(NONE if line[key] is None else f"{line[key]:.1%}" for key in ("mfu", "mfu_causal")),
        "{:.3f} ({:.3f} to {:.3f})".format(*seconds),
        *ratios,
        f"{line['memory_gib']:.2f}",
        verdict(line),
    ]


def verdict(line: Line) -> str:
    """Whether a row trained the same as the plain loop, and how far its losses are from that."""
    if line["kind"] == "plain":
        return "the reference"
    if line.get("equal") is None:
        return f"not compared: {line.get('not_compared')}"
    share = line["loss_share_of_bound"]
    size = "not finite" if share is None or share == float("inf") else f"{share:.2g}"
    at = f"{size} at step {line['loss_worst_step']}"
    if line["equal"]:
        return f"equal: {at}"
    return f"differs: {at}" if line["kind"] == "peer" else f"NOT EQUAL: {at}"


def _plain_of(line: Line, lines: Sequence[Line]) -> Line | None:
    """The plain loop of the same call that trains the same."""
    for other in lines:
        same = all(other.get(key) == line.get(key) for key in ("time", "trains", "device"))
        if other["kind"] == "plain" and same:
            return other
    return None


def rich_table(lines: Sequence[Line]) -> "Table":
    """The table for a terminal."""
    from rich.table import Table

    table = Table(*COLUMNS, box=None)
    ran = [line for line in lines if line.get("device")]
    table.title = f"{lines[0]['recipe']} on {ran[0]['device'] if ran else 'no device'}"
    for line in lines:
        table.add_row(*cells(line, _plain_of(line, lines)))
    return table


def splits_of(lines: Sequence[Line]) -> list[tuple[str, Line]]:
    """Where the time of each row's ranks goes (`Split.as_json`), labelled."""
    found = []
    for line in lines:
        ranks = line.get("profile") or []
        for rank, split in enumerate(ranks):
            place = f", rank {rank}" if len(ranks) > 1 else ""
            found.append((f"{line['row']}{place}", split))
    return found


def split_cells(label: str, split: Line) -> list[str]:
    """The cells of a rank's split."""
    seconds = [split["wall"], *(split["parts"][part] for part in PARTS), split["overlapped"]]
    launches = sum(split["launches"].values())
    return [label, *(f"{1000 * each:.1f}" for each in seconds), f"{launches:,.0f}"]


def split_table(lines: Sequence[Line]) -> "Table":
    """The table of the profiled rows for a terminal."""
    from rich.table import Table

    table = Table(*SPLIT_COLUMNS, box=None)
    for label, split in splits_of(lines):
        table.add_row(*split_cells(label, split))
    return table


def markdown(lines: Sequence[Line]) -> str:
    """Tables of all lines, for each call of the script, with what it ran on and how."""
    parts = []
    for call in dict.fromkeys((line["time"], line["command"]) for line in lines):
        mine = [line for line in lines if (line["time"], line["command"]) == call]
        first = next((line for line in mine if line.get("device")), mine[0])
        versions = [
            f"{name} {first[name]}"
            for name in ("torch", "deepspeed", "transformers", "megatron-core", "nccl", "python")
            if first.get(name)
        ]
        parts.append(
            f"{first['recipe']} on {first.get('device') or 'no device'}; {', '.join(versions)}; commit "
            f"{first['commit']}; {first['time'][:10]}; medians of {first.get('steps')} steps after "
            f"{first.get('warmup')}, rounds: {first.get('rounds')}\n\n```bash\n{first['command']}\n```\n"
        )
        parts.append(
            _markdown_table(COLUMNS, [cells(each, _plain_of(each, mine)) for each in mine])
        )
        if splits := splits_of(mine):
            parts.append(_markdown_table(SPLIT_COLUMNS, [split_cells(*each) for each in splits]))
    return "\n".join(parts)


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)
