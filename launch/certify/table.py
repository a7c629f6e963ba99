"""The certificate as a page: what was run with which versions, and how close each composition came."""

from collections.abc import Iterable
from itertools import combinations
from typing import Any

from launch.certify import covering
from launch.certify.array import Array
from launch.certify.axes import AXES, USUAL, Row, name, ranks, show
from launch.certify.results import Record, newest

KINDS = ("CPU", "GPU")
NOT_RUN = "not run"
# Columns that hold two axes each, or more, as few as a page has room for.
LAYOUT = ("data", "tensor", "pipeline")


def page(array: Array, records: Iterable[Record]) -> str:
    """The page in Markdown."""
    latest = newest(records)
    return "\n".join(
        [
            *_head(array),
            *_counts(array),
            *_versions(latest),
            *_outcomes(array, latest),
            *_refusals(array),
            *_table(array, latest),
        ]
    )


def _head(array: Array) -> list[str]:
    return [
        "# Certificate: which features compose, and how exactly",
        "",
        f"{len(array.rows)} compositions of small models, each trained for four steps on its ranks "
        "by DeepSpeed and on one device by a plain PyTorch loop without DeepSpeed. A composition holds "
        "if every loss, gradient norm and final weight differs by no more than rounding explains: the "
        "bounds are in [CONTRIBUTING.md](CONTRIBUTING.md#parity-bounds-and-results). This page is made "
        "by `python scripts/certify.py --table CERTIFICATE.md` from what was measured.",
        "",
    ]


def coverage(array: Array) -> dict[int, tuple[int, int, int]]:
    """Of pairs (2) and triples (3) of values: how many there are, compose and are covered, and do not."""
    found = {}
    for size in (2, 3):
        every = list(covering.combinations(AXES, combinations(AXES, size)))
        met = {c for row in array.rows for c in combinations(row.items(), size)}
        found[size] = len(every), len(met), len(every) - len(met)
    return found


def _counts(array: Array) -> list[str]:
    lines = [
        "| axis | values, the usual one first |",
        "| --- | --- |",
        *(f"| {axis} | {', '.join(map(show, values))} |" for axis, values in AXES.items()),
        "",
        "| combinations of | possible values | in a composition | that do not compose |",
        "| --- | --- | --- | --- |",
    ]
    for size, (every, met, impossible) in coverage(array).items():
        lines.append(f"| {size} axes | {every} | {met} | {impossible} |")
    return [*lines, ""]


def _versions(latest: dict[tuple[str, str], Record]) -> list[str]:
    """One line for all records with the same versions, with their dates and number."""
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for each in latest.values():
        groups.setdefault(tuple(each["versions"].items()), []).append(each["date"])
    lines = [
        "| device | compositions | date | Python | torch | DeepSpeed | transformers | commit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for items, dates in sorted(groups.items()):
        of = dict(items)
        when = min(dates) if min(dates) == max(dates) else f"{min(dates)} to {max(dates)}"
        packages = " | ".join(of[key] for key in ("python", "torch", "deepspeed", "transformers"))
        lines.append(f"| {of['device']} | {len(dates)} | {when} | {packages} | {of['commit']} |")
    return [*lines, ""]


def _outcomes(array: Array, latest: dict[tuple[str, str], Record]) -> list[str]:
    lines = []
    for device in KINDS:
        of = [latest[name(row), device] for row in array.rows if (name(row), device) in latest]
        ran = [each for each in of if each["status"] != NOT_RUN]
        if not ran:
            lines.append(f"- {device}: not run.")
            continue
        holding = [each for each in ran if each["status"] == "holds"]
        sentence = f"- {device}: {len(holding)} of {len(array.rows)} compositions hold"
        if len(ran) > len(holding):
            sentence += f", {len(ran) - len(holding)} do not"
        if len(array.rows) > len(ran):
            sentence += f", {len(array.rows) - len(ran)} were not run"
        if holding:
            closest = max(holding, key=lambda each: each["share"])
            sentence += (
                f". The largest difference is {closest['share']:.0%} of its tolerance "
                f"({closest['worst']}; {closest['composition']})"
            )
        lines.append(f"{sentence}.")
        lines += [
            f"  - {each['composition']}: {each['status']}"
            + (f", {each['worst']}: {each['share']:.0%}" if each["share"] is not None else "")
            for each in ran
            if each["status"] != "holds"
        ]
    return [*lines, ""]


def _refusals(array: Array) -> list[str]:
    lines = [
        "## What does not compose",
        "",
        f"{len(array.refused)} combinations are refused before a rank starts, with these lines; all other "
        "combinations that do not compose contain one of them, or leave an axis no value.",
        "",
        "| combination | reason |",
        "| --- | --- |",
    ]
    for values, reason in sorted(array.refused, key=lambda each: _order(each[0])):
        text = " ".join(reason.split()).replace("|", "\\|")
        lines.append(f"| {', '.join(f'{a}={show(v)}' for a, v in values)} | {text} |")
    return [*lines, ""]


def _order(values: Iterable[tuple[str, Any]]) -> list[tuple[int, int]]:
    places = list(AXES)
    return [(places.index(axis), AXES[axis].index(value)) for axis, value in values]


def _table(array: Array, latest: dict[tuple[str, str], Record]) -> list[str]:
    lines = [
        "## Compositions",
        "",
        "The last columns are the worst difference as a share of its tolerance. What a row does not name "
        f"has the usual value. The first {array.core} are the core, which `make test` runs.",
        "",
        "| ranks | data x tensor x pipeline | stage | composition | CPU | GPU |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in array.rows:
        layout = " x ".join(str(row[axis]) for axis in LAYOUT)
        shares = " | ".join(result(latest.get((name(row), device))) for device in KINDS)
        lines.append(f"| {ranks(row)} | {layout} | {row['stage']} | {described(row)} | {shares} |")
    return [*lines, ""]


def described(row: Row) -> str:
    """A row's unusual values, without those that have a column of their own."""
    own = (*LAYOUT, "stage")
    rest = [f"{a}={show(row[a])}" for a in AXES if a not in own and row[a] != USUAL[a]]
    return " ".join(rest) or "usual"


def result(each: Record | None) -> str:
    """A cell of the table: 12% where the composition holds, and else what came of it."""
    if each is None or each["status"] == NOT_RUN:
        return NOT_RUN
    if each["status"] == "fails":
        return "**fails**"
    share = f"{each['share']:.0%}" if each["share"] < 1e6 else "far off"
    return share if each["status"] == "holds" else f"**{share}**"
