"""Measure the memory and step time of many layouts, for the planner's constants and its proof.

    python -m tests.benchmarks.memory_grid --ranks 1 --out one.jsonl
    python -m tests.benchmarks.memory_grid --ranks 2 --out two.jsonl

A benchmark, which pytest does not collect. Every point is a model shape, a sequence length and a
layout, trained for a few steps on random tokens in fresh ranks; each appends a line to the file, and
a point whose line is there is left out, so that a run that was cut off goes on. `--part 1/2` takes
every second point, for two runs side by side on different GPUs.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.config.load import recipe_from_dict
from launch.config.schema import Recipe
from launch.errors import UserError
from launch.perf.memory_measure import STEPS, measure
from launch.runtime.failures import one_line_errors

GPT = {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True, "tied": True}
LLAMA = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "tied": False}

# Blocks as wide as those of models that people train, but few of them, so that a step is short.
SHAPES: dict[str, dict[str, object]] = {
    "gpt-2048": {**GPT, "layers": 8, "hidden": 2048, "heads": 16, "vocab": 50304},
    "llama-2048": {
        **LLAMA, "layers": 8, "hidden": 2048, "heads": 16, "kv_heads": 4, "ffn": 5632, "vocab": 32000
    },
    "qwen-1024": {
        **LLAMA, "layers": 14, "hidden": 1024, "heads": 16, "kv_heads": 8, "head_dim": 128,
        "ffn": 3072, "vocab": 151936, "qk_norm": True, "tied": True,
    },
    "gpt-4096": {**GPT, "layers": 4, "hidden": 4096, "heads": 32, "vocab": 50304},
}  # fmt: skip
# Sequence length: sequences in a micro batch.
BATCHES = {1024: 4, 2048: 6}
CHECKPOINT = "model.checkpoint_activations=true"
COMPILE = "train.compile=true"
# Most points were measured when gradients were added to their fp32 sums after the backward pass.
DEFERRED = "deepspeed.bf16.immediate_grad_update=false"
# And ZeRO-3's when they were copied into a bucket.
CONTIGUOUS = "deepspeed.zero_optimization.contiguous_gradients=true"
BF16_SUMS = "deepspeed.data_types.grad_accum_dtype=bf16"


@dataclass(frozen=True)
class Point:
    """One measurement: a shape, a sequence length and a layout's overrides on `ranks` ranks."""

    shape: str
    sequence: int
    layout: str
    ranks: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """Unique in a grid."""
        return f"{self.shape}, {self.sequence}, {self.layout}, {self.ranks}"


def layouts(ranks: int) -> dict[str, tuple[str, ...]]:
    """Overrides by name; the most telling first, as a run may be cut off."""
    zero: dict[int, tuple[str, ...]]
    zero = {s: (f"deepspeed.config=ds_configs/zero{s}.json",) for s in range(4)}
    now = zero[1]
    zero[1] = (*now, DEFERRED)
    zero[3] = (*zero[3], CONTIGUOUS)
    found: dict[str, tuple[str, ...]] = {}
    tensor, pipeline = "parallel.tensor=2", "parallel.pipeline=2"
    for stage in range(4):
        found[f"zero{stage}"] = zero[stage]
    for stage in (1, 3, 0, 2):
        found[f"zero{stage}, checkpoint"] = (*zero[stage], CHECKPOINT)
    if ranks == 2:
        found["tensor 2"] = (*zero[1], tensor)
        found["tensor 2, checkpoint"] = (*zero[1], tensor, CHECKPOINT)
        found["pipeline 2"] = (*zero[1], pipeline)
        found["pipeline 2, checkpoint"] = (*zero[1], pipeline, CHECKPOINT)
    for stage in (1, 3, 0, 2):
        found[f"zero{stage}, compile"] = (*zero[stage], COMPILE)
    found["zero1, checkpoint, compile"] = (*zero[1], CHECKPOINT, COMPILE)
    sums = ("deepspeed.config=ds_configs/zero2_bf16_states.json", BF16_SUMS)
    found["zero2, bf16 sums"] = sums
    found["zero2, bf16 sums, compile"] = (*sums, COMPILE)
    found["zero1, immediate"] = now
    found["zero1, immediate, compile"] = (*now, COMPILE)
    if ranks == 2:
        found["pipeline 2, compile"] = (*now, pipeline, COMPILE)
        chunks = (pipeline, "parallel.schedule=interleaved", "parallel.model_chunks=2")
        found["pipeline 2, interleaved"] = (*now, *chunks)
        found["pipeline 2, interleaved, compile"] = (*now, *chunks, COMPILE)
        found["tensor 2, compile"] = (*now, tensor, COMPILE)
        found["tensor 2, checkpoint, compile"] = (*now, tensor, CHECKPOINT, COMPILE)
        found["tensor 2, sequence"] = (*zero[1], tensor, "parallel.sequence=true")
        found["tensor 2, zero3"] = (*zero[3], tensor)
        found["pipeline 2, gpipe"] = (*zero[1], pipeline, "parallel.schedule=gpipe")
        found["zero3, checkpoint, compile"] = (*zero[3], CHECKPOINT, COMPILE)
        found["zero1, fp16"] = ("deepspeed.config=ds_configs/zero1_fp16.json",)
    else:
        found["zero1, documents"] = (*zero[1], "data.document_mask=true")
        found["zero2, offload"] = ("deepspeed.config=ds_configs/zero2_offload_cpu.json",)
        found["zero3, offload"] = ("deepspeed.config=ds_configs/zero3_offload_cpu.json",)
    return found


def points(ranks: int) -> Iterator[Point]:
    """All points for this many ranks, a layout of every shape before the next layout."""
    for layout, overrides in layouts(ranks).items():
        for sequence in BATCHES:
            for shape in SHAPES:
                if (shape, layout) != ("qwen-1024", "pipeline 2, gpipe"):  # over 80 GiB
                    yield Point(shape, sequence, layout, ranks, overrides)


def recipe_of(point: Point) -> Recipe:
    """The recipe of a point: two micro batches a rank, and four in a pipeline.

    Raises:
        UserError: if the layout is not one for this shape.
    """
    names = ("model", "data", "parallel", "train", "deepspeed")
    blocks: dict[str, Any] = {name: {} for name in names}
    for override in point.overrides:
        key, _, value = override.partition("=")
        *path, name = key.split(".")
        block = blocks
        for part in path:
            block = block.setdefault(part, {})
        block[name] = {"true": True, "false": False, "2": 2}.get(value, value)
    split = blocks["parallel"]
    data = point.ranks // (2 if split else 1)
    micro = BATCHES[point.sequence]
    blocks["model"] |= {**SHAPES[point.shape], "context": point.sequence}
    blocks["data"] |= {"sequence_length": point.sequence}
    blocks["train"] |= {
        "steps": 100,
        "micro_batch_size": micro,
        "global_batch_size": micro * data * (4 if "pipeline" in split else 2),
    }
    return recipe_from_dict({"name": "grid", **blocks})


def measured_line(point: Point, steps: int) -> dict[str, Any]:
    """A point's line: its description, and each rank's memory, or why it failed."""
    line: dict[str, Any] = {"name": point.name, **asdict(point)}
    started = time.perf_counter()
    try:
        found = measure(recipe_of(point), point.ranks, steps)
        line["measured"] = [asdict(each) for each in found]
    except UserError as error:
        line["failed"] = str(error)
    line["took"] = round(time.perf_counter() - started, 1)
    return line


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--only", default="", help="points with this text in their name")
    parser.add_argument("--done", type=Path, nargs="*", default=[], help="files of earlier runs")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no point after these")
    given = parser.parse_args()
    started = time.monotonic()
    which, parts = (int(number) for number in given.part.split("/"))
    chosen = [point for point in points(given.ranks) if given.only in point.name]
    files = [file for file in (given.out, *given.done) if file.exists()]
    lines = [line for file in files for line in file.read_text().splitlines()]
    done = {json.loads(line)["name"] for line in lines}
    with one_line_errors():
        for point in chosen[which - 1 :: parts]:
            if point.name in done:
                continue
            if time.monotonic() - started > given.seconds:
                break
            line = measured_line(point, given.steps)
            with given.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(point.name, line["took"], "s", line.get("failed", "")[:200], flush=True)


if __name__ == "__main__":
    main()
