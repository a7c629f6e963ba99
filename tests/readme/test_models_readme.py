"""models/README.md: its files exist, its formulas are what the code sends, and its example runs."""

import contextlib
import io
import re
import runpy
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.config.load import load_recipe
from launch.paths import ROOT
from models import gpt, norms
from models import pipeline_schedules as schedules
from models.config import SIZES, GPTConfig
from models.gpt import GPT
from models.init_weights import initialize
from models.parallel import collectives, tensor_parallel
from tests.collectives import Traffic
from tests.parity.cases import write_text
from tests.ranks import run_ranks
from tests.unit.test_tp_faults import SEEDED
from tests.unit.tp_cases import FAMILIES, make_tp, start, tokens_and_labels

TEXT = (ROOT / "models" / "README.md").read_text()
# torch's operations by the names of what they do.
COLLECTIVES = {
    "send": "send", "allreduce_": "all-reduce", "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}  # fmt: skip
SCALARS = 16  # bytes: a loss, a norm or an overflow flag
Counts = dict[tuple[str, str], tuple[int, int]]  # (pass or stage, collective): calls, bytes


@dataclass(frozen=True)
class Row:
    """A line of a table: under which conditions it holds, and its cells by their column."""

    conditions: frozenset[str]
    cells: dict[str, str]


def table(name: str) -> list[Row]:
    """The table behind the comment of this name."""
    block = re.search(rf"<!-- {name} -->\n((?:\|.*\n)+)", TEXT)
    assert block, f"no table {name}"
    header, _, *lines = (
        [cell.strip() for cell in line.strip("|\n").split("|")] for line in block[1].splitlines()
    )
    rows = [dict(zip(header, cells, strict=True)) for cells in lines]
    return [Row(frozenset(re.findall(r"`(\w+)`", row["if"])), row) for row in rows]


def value(formula: str, symbols: dict[str, int]) -> float:
    formula = formula.strip("`")
    assert re.fullmatch(r"[\w+*/()\- ]+", formula), formula
    return float(eval(formula, {"__builtins__": {}}, symbols))


def symbols(config: GPTConfig, element: int, ranks: int) -> dict[str, int]:
    vectors = re.search(r"`([^`]+)` in a GPT-2.*`([^`]+)` in a Llama", TEXT)
    assert vectors
    known = {
        "L": config.layers, "h": config.hidden, "d": config.head_dim, "e": element, "t": ranks
    }  # fmt: skip
    return {**known, "v": int(value(vectors[1 if config.bias else 2], known))}


def stated(
    rows: list[Row], where: str, holds: set[str], known: dict[str, int], tokens: int, times: int = 1
) -> Counts:
    """What the table says is sent for `times` micro batches of `tokens` tokens."""
    total: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.conditions <= holds:
            entry = total.setdefault((row.cells[where], row.cells["collective"]), [0, 0])
            many = tokens if row.cells["per"] == "token" else 1
            entry[0] += times * value(row.cells["calls"], known)
            entry[1] += times * many * value(row.cells["bytes"], known)
    return {key: (int(calls), int(size)) for key, (calls, size) in total.items()}


def sums(seen: list[tuple[str, int]], where: str, names: dict[str, str]) -> Counts:
    """Calls and bytes of each collective in `names`, scalars left out."""
    calls: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, size in seen:
        if name in names and size > SCALARS:
            calls[names[name]] += 1
            sizes[names[name]] += size
    return {(where, name): (calls[name], sizes[name]) for name in calls}


def test_every_file_is_named_and_every_name_is_a_file() -> None:
    named = set(re.findall(r"[\w./]+\.(?:py|md|yaml|json)\b", TEXT)) - {"pair.py"}
    for name in named:
        assert (ROOT / name).is_file() or (ROOT / "models" / name).is_file(), name
    for file in (ROOT / "models").rglob("[!_]*.py"):
        name = file.relative_to(ROOT / "models").as_posix()
        assert f"| [{name}]({name}) |" in TEXT, f"{name} is not in the reading order"
    for row in table("counted: tensor"):
        for name in re.findall(r"`(\w{2,})`", row.cells["where"]):
            modules = (gpt, norms, tensor_parallel, collectives)
            assert any(hasattr(module, name) for module in modules), name


def test_every_seeded_fault_that_is_named_is_seeded() -> None:
    named = re.findall(r'"([^"]+)"', TEXT.partition("seeded as a fault")[2])
    assert len(named) == 3 and set(named) <= set(SEEDED)


def test_the_timelines_are_those_of_the_schedules() -> None:
    lines = re.findall(r"stage \d   ([A-D1-4. ]{23})", TEXT)
    assert len(lines) == 9 and all(line in str(schedules.__doc__) for line in lines[:6])


def tensor_cases() -> Iterator[tuple[GPTConfig, set[str]]]:
    for family in FAMILIES.values():
        always = {"shared"} if family.kv_heads < 2 else set()
        always |= {"qk_norm"} if family.qk_norm else set()
        for form in ("whole", "sequence"):
            yield family, always | {form}
            yield family, always | {form, "recompute"}
    for form in ("whole", "sequence"):
        yield replace(FAMILIES["gpt2"], dropout=0.1), {form, "recompute", "dropout"}


def sent_by_tensor_ranks() -> list[Counts]:
    start()
    found = []
    for config, holds in tensor_cases():
        model = GPT(config, "recompute" in holds, make_tp(config, "sequence" in holds))
        initialize(model, 1)
        tokens, labels = tokens_and_labels(config.vocab)
        with Traffic() as forward:
            loss = model(tokens, labels)
        with Traffic() as backward:
            loss.backward()
        found.append(
            sums(forward.payloads, "forward", COLLECTIVES)
            | sums(backward.payloads, "backward", COLLECTIVES)
        )
    return found


def test_tensor_ranks_send_what_the_table_says() -> None:
    rows = table("counted: tensor")
    tokens = tokens_and_labels(2)[0].numel()
    for results in run_ranks(sent_by_tensor_ranks, 2):
        for (config, holds), found in zip(tensor_cases(), results, strict=True):
            known = symbols(config, torch.float32.itemsize, 2)
            assert found == stated(rows, "pass", holds, known, tokens), holds
    used = set[str]().union(*(holds for _, holds in tensor_cases()))
    assert used == set[str]().union(*(row.conditions for row in rows))


@pytest.mark.parametrize("size", ["6b7", "llama3_8b"])
def test_the_worked_example_follows_from_the_table(size: str) -> None:
    ranks = 2
    known = symbols(SIZES[size], torch.bfloat16.itemsize, ranks)
    on_the_wire = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0}
    per_token = [row for row in table("counted: tensor") if row.cells["per"] == "token"]
    for row in table(f"worked: tensor, {ranks} ranks"):
        total = stated(per_token, "pass", set(row.conditions), known, 1)
        payload = sum(size for _, size in total.values())
        wire = sum(on_the_wire[name] * size for (_, name), (_, size) in total.items())
        expected = {"payload": payload, "wire": wire * (ranks - 1) / ranks}
        for column, cell in row.cells.items():
            if f"`{size}`" in column:
                assert int(cell.replace(",", "")) == expected[column.split()[-1]], column
    assert f"{known['v'] * known['h'] * known['e']:,} for the" in TEXT


def step_of_engine(values: dict[str, Any], folder: Path) -> tuple[int, list[tuple[str, int]]]:
    """The stage's number of parameters, and what its second step sends (the first agrees on shapes)."""
    from launch.training.setup import local_engine
    from launch.training.train_step import train_step

    with local_engine(values, folder) as local:
        train_step(local.engine, local.batch(0))
        with Traffic() as traffic:
            train_step(local.engine, local.batch(1))
        parameters = local.engine.module.parameters()
        return sum(getattr(p, "ds_numel", p.numel()) for p in parameters), traffic.payloads


def recipe_values(folder: Path, stem: str, changes: dict[str, Any]) -> dict[str, Any]:
    given = {
        "model.layers": 2, "model.hidden": 32, "model.context": 16, "data.sequence_length": 16,
        "data.source": write_text(folder), "data.tokenizer": "bytes",
        "data.cache_dir": folder / "cache", "train.steps": 2, "train.micro_batch_size": 1,
        "train.global_batch_size": 4, **changes,
    }  # fmt: skip
    file = ROOT / "recipes" / f"gpt_tiny_{stem}.yaml"
    return load_recipe(file, [f"{key}={item}" for key, item in given.items()]).model_dump()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traffic")


@pytest.mark.parametrize(
    ("condition", "tensor"),
    [("alone", 1), ("partitioned", 2), ("sequence", 2), ("interleaved", 1), ("interleaved", 2)],
)
def test_stages_send_what_the_table_says(condition: str, tensor: int, folder: Path) -> None:
    changes: dict[str, Any] = {
        "parallel.pipeline": 2, "parallel.tensor": tensor,
        "parallel.sequence": condition == "sequence",
    }  # fmt: skip
    if condition == "interleaved":
        changes |= {
            "model.layers": 4, "parallel.schedule": "interleaved", "parallel.model_chunks": 2
        }  # fmt: skip
    values = recipe_values(folder, "zero1", changes)
    results = run_ranks(step_of_engine, 2 * tensor, values, folder)
    config = replace(SIZES["tiny"], layers=2, hidden=32, head_dim=0, ffn=0)
    known = symbols(config, torch.float32.itemsize, tensor)
    holds = {condition, *(["gathered"] if tensor > 1 else [])}
    expected = stated(table("counted: pipeline"), "stage", holds, known, 16, times=4)
    # With sequence parallelism the layers gather too; those are in the table of tensor ranks.
    names = ["send"] if condition == "sequence" else ["send", "_allgather_base_"]
    messages = {name: COLLECTIVES[name] for name in names}
    tied = ("allreduce_", torch.float32.itemsize * config.vocab * config.hidden // tensor)
    for rank, (_, seen) in enumerate(results):
        stage = "before" if rank < tensor else "after"
        assert sums(seen, stage, messages) == {k: v for k, v in expected.items() if k[0] == stage}
        assert seen.count(tied) == 1


@pytest.mark.parametrize("stage", range(4))
def test_zero_sends_what_the_table_says(stage: int, folder: Path) -> None:
    changes: dict[str, Any] = {"model.tied": False}
    if stage:  # 0 keeps fp32 weights
        changes["deepspeed.bf16.enabled"] = True
    if stage == 3:  # as for a model too large for each of these
        for key in (
            "stage3_param_persistence_threshold", "stage3_max_live_parameters",
            "stage3_max_reuse_distance", "stage3_prefetch_bucket_size",
        ):  # fmt: skip
            changes[f"deepspeed.zero_optimization.{key}"] = 0
    ranks = 2
    values = recipe_values(folder, f"zero{stage}", changes)
    rows = [row for row in table("counted: data") if row.conditions == {f"zero{stage}"}]
    for parameters, seen in run_ranks(step_of_engine, ranks, values, folder):
        found = {name: size for (_, name), (_, size) in sums(seen, "", COLLECTIVES).items()}
        expected = {
            row.cells["collective"]: value(row.cells["bytes"], {"m": 4 // ranks}) * parameters
            for row in rows
        }
        assert found == expected


def run_the_example(folder: Path) -> tuple[str, set[str]]:
    """Its output, and the modules called models that it has loaded, from a copy of two files."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
        del sys.modules[name]
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p).resolve() != ROOT)]
    printed = io.StringIO()
    script = folder / "pair.py"
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(script))
    loaded = {name for name in sys.modules if name.startswith("models.")}
    assert all(str(sys.modules[name].__file__).startswith(str(folder)) for name in loaded)
    return printed.getvalue(), loaded


def test_the_pair_of_layers_can_be_copied(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.S | re.M)
    (tmp_path / "pair.py").write_text(block)
    shutil.copytree(ROOT / "models" / "parallel", tmp_path / "models" / "parallel")
    for printed, loaded in run_ranks(run_the_example, 2, tmp_path):
        assert "[32, 16] of [64, 16], same gradients" in printed
        assert loaded == {
            "models.parallel",
            "models.parallel.collectives",
            "models.parallel.copy_engine",
            "models.parallel.tensor_parallel",
        }
