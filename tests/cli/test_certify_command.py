"""scripts/certify.py: what it runs, keeps, shows and refuses."""

import argparse
import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from launch.certify import array, results, table
from launch.certify.axes import USUAL, Row, name, ranks, show
from launch.certify.run import Devices, Outcome, run_all
from launch.errors import UserError
from launch.paths import ROOT
from scripts import certify as command
from tests.cli.commands import run

ARRAY = array.load()
ALONE = next(
    row for row in ARRAY.rows if ranks(row) == 1 and row["offload"] == "none" and not row["compile"]
)
VERSIONS = {
    "torch": "2", "deepspeed": "0", "transformers": "5", "python": "3", "device": "CPU", "commit": "c",
}  # fmt: skip


def arguments(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"core": False, "only": None, **given})


def words(out: Path) -> list[str]:
    only = " ".join(f"{axis}={show(value)}" for axis, value in ALONE.items())
    return ["--only", only, "--jobs", "2", "--out", str(out)]


def test_it_runs_what_is_asked_for_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "warnoptions", [*sys.warnoptions])  # the command adds to them
    out = tmp_path / "results.jsonl"
    assert command.main(words(out)) == 0
    found = results.read(out)
    assert [each["composition"] for each in found] == [name(ALONE)]
    assert found[0]["status"] == "holds"
    assert 0 < found[0]["share"] < 1
    assert found[0]["values"] == ALONE
    assert found[0]["versions"].keys() == VERSIONS.keys()
    assert found[0]["versions"]["device"] == "CPU"
    capsys.readouterr()
    assert command.main(words(out)) == 0
    assert f"0 compositions to run, 1 in {out} already" in capsys.readouterr().out
    assert results.read(out) == found


@pytest.mark.matrix  # with ranks of this session's server: the test above
def test_it_runs_as_a_process_with_a_server_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    done = run([sys.executable, ROOT / "scripts/certify.py", *words(out)])
    assert done.code == 0, done.output
    assert [each["status"] for each in results.read(out)] == ["holds"]


def test_what_names_no_composition_or_no_jobs_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--only stage=7: no composition has that"):
        command.chosen(arguments(only="stage=7"))
    with pytest.raises(UserError, match="--jobs: 0 is too few"):
        command.certify([ALONE], 0, tmp_path / "none.jsonl")
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"other\.jsonl: line 1 is no result of this command"):
        results.read(tmp_path / "other.jsonl")


def test_the_core_and_values_choose() -> None:
    assert command.chosen(arguments(core=True)) == ARRAY.rows[: ARRAY.core]
    chosen = command.chosen(arguments(only="pipeline=2 stage=1"))
    assert {(row["pipeline"], row["stage"]) for row in chosen} == {(2, 1)}


def outcomes(rows: list[Row], devices: Devices, folder: Path) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    run_all(rows, folder, 1, devices, lambda row, outcome: found.update({name(row): outcome}))
    return found


def test_what_needs_more_gpus_than_there_are_is_not_run(tmp_path: Path) -> None:
    row = USUAL | {"tensor": 2, "data": 2}
    found = outcomes([row], Devices(["5", "7"]), tmp_path)
    assert found[name(row)] == Outcome("not run", text="it needs 4 GPUs, and there are 2")


def test_what_the_ranks_raise_fails_the_composition_alone(tmp_path: Path) -> None:
    wrong = USUAL | {"pipeline": 2, "stage": 2}
    found = outcomes([wrong], Devices([]), tmp_path)[name(wrong)]
    assert found.status == "fails"
    assert "UserError: parallel.pipeline: DeepSpeed runs a pipeline with ZeRO-0 or 1" in found.text
    assert found.share is None


def test_a_gpu_is_lent_to_one_at_a_time() -> None:
    devices, taken, seen = Devices(["4", "5", "6"]), threading.Event(), []

    def take() -> None:
        with devices.lent(2) as env:
            seen.append(env)
            taken.set()

    other = threading.Thread(target=take)
    with devices.lent(2) as env:
        assert env == {"CUDA_VISIBLE_DEVICES": "4,5"}
        other.start()
        assert not taken.wait(0.2)  # one is left, and two are asked for
    other.join()
    assert seen == [{"CUDA_VISIBLE_DEVICES": "4,5"}]


def test_a_shared_gpu_is_lent_once_a_composition_and_the_least_used_first() -> None:
    devices = Devices(["4", "5"], share=2)
    with devices.lent(1) as first, devices.lent(1) as second, devices.lent(2) as both:
        assert [env["CUDA_VISIBLE_DEVICES"] for env in (first, second, both)] == ["4", "5", "4,5"]


def line(row: Row, status: str, share: float | None = 0.5, **versions: str) -> results.Record:
    outcome = Outcome(status, share, "loss, step 2", 1.0)
    written: results.Record = json.loads(
        json.dumps(results.record(row, outcome, VERSIONS | versions))
    )
    return written


def test_a_result_counts_for_its_versions_and_what_was_not_run_is_run_again() -> None:
    first, second, third = ARRAY.rows[:3]
    records = [line(first, "holds"), line(second, "not run"), line(third, "holds", commit="d")]
    assert results.finished(records, VERSIONS) == {name(first)}


def test_the_page_tells_the_newest_outcome_of_each() -> None:
    first, second, third = ARRAY.rows[:3]
    records = [
        line(first, "differs", 3.0), line(first, "holds", 0.25), line(first, "not run", None),
        line(first, "holds", 0.75, device="H100"), line(second, "differs", 1.5),
        line(third, "fails", None, device="H100"),
    ]  # fmt: skip
    page = table.page(ARRAY, records)
    rows = [each for each in page.split("## Compositions")[1].splitlines() if each[:3] != "| -"]
    cells = [[cell.strip() for cell in each.split("|")[-3:-1]] for each in rows if "|" in each]
    assert cells[1:5] == [
        ["25%", "75%"], ["**150%**", "not run"], ["not run", "**fails**"], ["not run", "not run"],
    ]  # fmt: skip
    assert len(cells) == len(ARRAY.rows) + 1
    assert f"CPU: 1 of {len(ARRAY.rows)} compositions hold, 1 do not, " in page
    assert f"{name(second)}: differs, loss, step 2: 150%" in page
    for values, reason in ARRAY.refused:
        assert values
        assert " ".join(reason.split()).replace("|", "\\|") in page
