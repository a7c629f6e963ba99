"""What a slow link between two hosts costs each layout, measured: bytes sent and seconds per step.

    python -m tests.benchmarks.slow_links            (as root; some five minutes)

A benchmark, which pytest does not collect: it prints the table of recipes/BENCHMARKS.md. It needs the
virtual hosts of `tests/cluster`, whose test_slow_links.py checks the bytes. One rank a host, on this
machine's CPU in fp32, over gloo and TCP; the link between the two virtual hosts is as slow as `tc`
makes it.
"""

import statistics
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from launch.config.load import load_recipe
from launch.config.schema import GPTModel
from launch.paths import ROOT
from launch.runtime.failures import one_line_errors
from launch.runtime.local_launcher import free_port
from launch.runtime.run_dir import read_metrics
from launch.runtime.world_info import encode_world_info
from models.config import count_parameters
from tests.cluster.virtual import Cluster
from tests.resume.runs import write_text

LAYOUTS = {
    "ZeRO-1": "gpt_tiny_zero1",
    "ZeRO-2": "gpt_tiny_zero2",
    "ZeRO-3": "gpt_tiny_zero3",
    "pipeline 2": "gpt_tiny_pp2_zero1",
}
RATES = ("unlimited", "1gbit", "100mbit")
STEPS_AT_FIRST, STEPS = 2, 8
# Few samples and a model of some width: what moves is then seen beside what is computed.
SEQUENCE, SAMPLES = 128, 4
WIDE = ("model.layers=4", "model.hidden=320", "model.heads=5")
FP32 = 4  # bytes of a weight, a gradient and an activation
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
RUN_SECONDS = 600.0


@dataclass(frozen=True)
class Measured:
    """A run: bytes that each host sent from start to end, and a step's seconds, the median."""

    steps: int
    sent: tuple[int, ...]
    seconds: float


def train(cluster: Cluster, layout: str, rate: str, steps: int) -> Measured:
    """Train on both hosts, one rank each, started as a cluster's own engine would start them."""
    write_text(cluster.folder / "text")
    run = cluster.folder / f"{layout.replace(' ', '_')}_{rate}_{steps}"
    world = encode_world_info({host: [0] for host in cluster.hosts})
    port = str(free_port())
    before = [cluster.sent_bytes(host) for host in cluster.hosts]
    command: list[str | Path] = [ROOT / "launch/train.py", "--config", _recipe(layout)]
    for each in (*_overrides(layout, cluster.folder, steps), f"run.dir={run}"):
        command += ["--set", each]
    with nullcontext() if rate == "unlimited" else cluster.limit(rate):
        processes = [
            cluster.start(
                [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}",
                 f"--node_rank={number}", f"--master_addr={cluster.hosts[0]}",
                 f"--master_port={port}", *command],
                host, env=ENVIRONMENT,
            )
            for number, host in enumerate(cluster.hosts)
        ]  # fmt: skip
        try:
            for process in processes:
                output, _ = process.communicate(timeout=RUN_SECONDS)
                assert process.returncode == 0, output
        finally:
            for host in cluster.hosts:
                for rank in cluster.ranks(host):
                    with suppress(psutil.NoSuchProcess):
                        rank.kill()
    after = [cluster.sent_bytes(host) for host in cluster.hosts]
    records = read_metrics(run / "metrics.jsonl")
    seconds = [record["seconds"] for record in records if record["step"] > 1 and "loss" in record]
    sent = tuple(late - early for early, late in zip(before, after, strict=True))
    return Measured(steps, sent, statistics.median(seconds))


def sent_a_step(short: Measured, long: Measured) -> list[float]:
    """Bytes that each host sent in a step: start and end of both runs are the same, and drop out."""
    steps = long.steps - short.steps
    return [(late - early) / steps for early, late in zip(short.sent, long.sent, strict=True)]


def expected(layout: str) -> int:
    """Bytes that each of two hosts sends in a step by the tables of models/README.md.

    Of two ranks each puts an all-reduce's payload on the wire, and half of that of a gather. gloo
    has no reduce-scatter of its own: torch all-reduces instead (NCCL sends half of that).
    """
    recipe = load_recipe(_recipe(layout), _overrides(layout, Path("/tmp"), 1))
    assert isinstance(recipe.model, GPTModel)
    config = recipe.model.shape
    if layout == "pipeline 2":
        activations = SAMPLES * SEQUENCE * config.hidden
        return FP32 * (activations + config.vocab * config.hidden)  # and the tied gradient
    # Gradients are reduced, weights gathered.
    return FP32 * count_parameters(config) * 3 // 2


def _recipe(layout: str) -> Path:
    return ROOT / f"recipes/{LAYOUTS[layout]}.yaml"


def _overrides(layout: str, folder: Path, steps: int) -> list[str]:
    return [
        *WIDE, f"model.context={SEQUENCE}", f"data.sequence_length={SEQUENCE}",
        f"data.source={folder}/text", f"data.cache_dir={folder}/cache", f"train.steps={steps}",
        f"train.global_batch_size={SAMPLES}",
        f"train.micro_batch_size={1 if layout == 'pipeline 2' else SAMPLES // 2}",
        "train.eval_every=0", "train.eval_batches=1", "train.schedule.warmup_steps=0",
        "run.tensorboard=false", "run.sample_tokens=0",
    ]  # fmt: skip


def table(cluster: Cluster) -> Iterator[str]:
    """The lines of the table, each as soon as it is measured."""
    yield "| layout | MB a host a step: by formula | measured | seconds per step: unlimited | " + (
        " | ".join(f"{rate} (ratio)" for rate in RATES[1:]) + " |"
    )
    yield "| --- " * (len(RATES) + 3) + "|"
    for layout in LAYOUTS:
        runs = [train(cluster, layout, rate, STEPS) for rate in RATES]
        sent = max(sent_a_step(train(cluster, layout, RATES[0], STEPS_AT_FIRST), runs[0]))
        seconds = [f"{runs[0].seconds:.2f}"]
        seconds += [f"{r.seconds:.2f} ({r.seconds / runs[0].seconds:.1f})" for r in runs[1:]]
        yield (
            f"| {layout} | {expected(layout) / 1e6:.2f} | {sent / 1e6:.2f} | "
            f"{' | '.join(seconds)} |"
        )


def main() -> None:
    """Print the table."""
    cluster = Cluster()
    try:
        cluster.up()
        for line in table(cluster):
            print(line, flush=True)
    finally:
        cluster.down()


if __name__ == "__main__":
    with one_line_errors():
        main()
