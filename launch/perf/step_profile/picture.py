"""A picture of where steps' time goes: a bar a row of the benchmark and rank."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.perf.step_profile.kinds import ATTENTION, COPY, ELEMENTWISE, GEMM, LOSS, OPTIMIZER
from launch.perf.step_profile.split import EXPOSED, IDLE, PARTS

COLOURS = {
    GEMM: "#1f5fa8", ATTENTION: "#4fa3d1", LOSS: "#8b6bb1", OPTIMIZER: "#3a9d6e",
    ELEMENTWISE: "#f0b840", COPY: "#b9a27c", EXPOSED: "#d1495b", IDLE: "#dddddd",
}  # fmt: skip
NARROW = 0.04  # of the picture's width: a part below has no number


def save_picture(splits: Sequence[tuple[str, dict[str, Any]]], title: str, file: Path) -> None:
    """Draw labelled splits (`Split.as_json`) one below the other, in milliseconds a step."""
    # Without pyplot, which also looks for a window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.6 + 0.45 * len(splits)), layout="constrained")
    axes = figure.subplots()
    longest = max(split["wall"] for _, split in splits) * 1000
    left = [0.0] * len(splits)
    for part in PARTS:
        sizes = [split["parts"][part] * 1000 for _, split in splits]
        axes.barh(range(len(splits)), sizes, left=left, height=0.7, color=COLOURS[part], label=part)
        for place, (start, size) in enumerate(zip(left, sizes, strict=True)):
            if size > NARROW * longest:
                axes.text(
                    start + size / 2, place, f"{size:.0f}", ha="center", va="center", fontsize=8
                )
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axes.set_yticks(range(len(splits)), [label for label, _ in splits])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a step")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(PARTS) // 2, frameon=False)
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
