"""Draw memory per rank as stacked bars against the card's capacity."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from launch.memory.estimate import GIB
from launch.memory.parts import Parts

Bar = tuple[str, Parts, float, float | None]  # name, parts, GiB outside the allocator, GiB measured


def draw(bars: Sequence[Bar], capacity: float | None, title: str, file: Path) -> None:
    """One bar for each layout; a mark where a measured value is known.

    Args:
        bars: from top to bottom.
        capacity: the card's memory in GiB, drawn as a line; None: no line.
        title: above the picture.
        file: a png or svg.
    """
    # Without pyplot, which also looks for a window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.42 * len(bars)), layout="constrained")
    axes = figure.subplots()
    names = [field.name for field in fields(Parts)]
    left = [0.0] * len(bars)
    rows = list(range(len(bars), 0, -1))
    for number, name in enumerate([*names, "outside torch"]):
        widths = [
            outside if name == "outside torch" else getattr(parts, name) / GIB
            for _, parts, outside, _ in bars
        ]
        axes.barh(rows, widths, left=left, label=name, color=f"C{number}")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    points = [(value, row) for (_, _, _, value), row in zip(bars, rows, strict=True) if value]
    if points:
        axes.plot(*zip(*points, strict=True), "k|", markersize=16, label="measured")
    if capacity is not None:
        axes.axvline(capacity, color="black", linestyle="--", label="the card's memory")
    axes.set_yticks(rows, [name for name, *_ in bars])
    axes.set_xlabel("GiB per rank, at the peak")
    axes.set_title(title)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, dpi=120)
