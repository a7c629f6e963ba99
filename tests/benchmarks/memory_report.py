"""Compare the planner with what tests/benchmarks/memory_grid.py measured: recipes/MEMORY.md's table.

python -m tests.benchmarks.memory_report one.jsonl two.jsonl     (writes tests/recipes/gpu_memory.csv)
python -m tests.benchmarks.memory_report                         (from that file)
"""

import csv
import json
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from launch.config.layout import plan_layout
from launch.config.resolve import resolve
from launch.memory.estimate import GIB
from launch.paths import ROOT
from launch.planner.cards import CARDS
from launch.planner.search import Cluster, Plan, evaluate
from tests.benchmarks.memory_grid import Point, layouts, recipe_of

MEASURED = ROOT / "tests" / "recipes" / "gpu_memory.csv"
# What was used to find the terms of the memory; qwen-1024 those of its norms of queries and keys alone.
FITTED = ("gpt-2048", "llama-2048", "qwen-1024")


@dataclass(frozen=True)
class Row:
    """A measured rank, the fullest of its pipeline stage: peak in bytes, and the step's seconds.

    0 seconds: not to be compared.
    """

    point: Point
    stage: int
    peak: int
    seconds: float
    plan: Plan

    @property
    def error(self) -> float:
        """Of the predicted peak, relative."""
        return self.plan.stages[self.stage].parts.total / self.peak - 1

    @property
    def timed(self) -> bool:
        """Whether its step time is compared: once a layout, by its first stage."""
        return self.stage == 0 and self.seconds > 0


def collect(files: list[Path]) -> None:
    """Keep of the grid's lines what the comparison needs."""
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    with MEASURED.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["shape", "sequence", "layout", "ranks", "stage", "peak", "seconds"])
        for line in lines:
            found = line.get("measured", [])
            seconds = max((statistics.median(rank["seconds"][2:]) for rank in found), default=0.0)
            for stage in sorted({rank["stage"] for rank in found}):
                peak = max(rank["peak"] for rank in found if rank["stage"] == stage)
                point = [line[key] for key in ("shape", "sequence", "layout", "ranks")]
                rows.writerow([*point, stage, peak, round(seconds, 4)])


def rows() -> list[Row]:
    """Every measured rank with its plan for the same layout on H200s."""
    found = []
    with MEASURED.open() as file:
        for line in csv.DictReader(file):
            ranks = int(line["ranks"])
            overrides = layouts(ranks)[line["layout"]]
            point = Point(line["shape"], int(line["sequence"]), line["layout"], ranks, overrides)
            recipe = recipe_of(point)
            layout = plan_layout(recipe, ranks)
            cluster = Cluster(CARDS["h200"], ranks)
            plan = evaluate(recipe, layout, resolve(recipe, layout), cluster)
            stage, peak = int(line["stage"]), int(line["peak"])
            found.append(Row(point, stage, peak, float(line["seconds"]), plan))
    return found


def pairs_in_order(found: list[Row], apart: float = 0.05) -> tuple[int, int]:
    """Of the pairs of layouts whose measured times differ, how many are predicted in order; and all."""
    groups = defaultdict(list)
    for row in found:
        if row.timed:
            groups[row.point.shape, row.point.sequence, row.point.ranks].append(row)
    right = total = 0
    for group in groups.values():
        for i, one in enumerate(group):
            for other in group[:i]:
                if abs(one.seconds / other.seconds - 1) > apart:
                    total += 1
                    faster = one.plan.time.total < other.plan.time.total
                    right += faster == (one.seconds < other.seconds)
    return right, total


def main() -> None:
    """Command-line entry point."""
    if len(sys.argv) > 1:
        collect([Path(name) for name in sys.argv[1:]])
    found = sorted(rows(), key=lambda row: -abs(row.error))
    errors = [abs(row.error) for row in found]
    times = [abs(row.plan.time.total / row.seconds - 1) for row in found if row.timed]
    right, total = pairs_in_order(found)
    print(f"{len(found)} peaks: worst {max(errors):.2%}, median {statistics.median(errors):.3%}")
    print(f"{len(times)} step times: worst {max(times):.0%}, median {statistics.median(times):.1%}")
    print(f"order of step times: {right} of {total} pairs that differ by more than 5%\n")
    print(
        "| shape | tokens | layout | GPUs | stage | measured GiB | predicted | error | s | predicted |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in found:
        point, stage = row.point, row.plan.stages[row.stage]
        print(
            f"| {point.shape} | {point.sequence} | {point.layout} | {point.ranks} | {row.stage} | "
            f"{row.peak / GIB:.2f} | {stage.total:.2f} | {row.error:+.2%} | "
            f"{f'{row.seconds:.3f}' if row.seconds else '-'} | {row.plan.time.total:.3f} |"
        )


if __name__ == "__main__":
    main()
