"""The survey asks each version for what is missing, keeps what it answers, and says what did not run."""

import json
from pathlib import Path

import pytest

from launch.errors import UserError
from launch.versions import environments, survey
from launch.versions.compositions import AXES, PROBES, covering
from launch.versions.results import NOT_RUN, OK, WRONG, Difference, Result, append, read, to_json

FIRST, SECOND = PROBES[0].name, PROBES[1].name


@pytest.fixture
def versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of versions; what is in it counts as installed."""
    monkeypatch.setattr(environments, "FOLDER", tmp_path / "versions")
    return tmp_path / "versions"


def install(versions: Path, version: str, answers: list[Result], claims: str = "") -> Path:
    folder = versions / version
    folder.mkdir(parents=True)
    about = {"deepspeed": claims or version, "file": str(folder / "deepspeed/__init__.py")}
    lines = [about, *(to_json(answer) for answer in answers)]
    (folder / "answers").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def ask(version: str, out: Path) -> dict[str, Result]:
    survey.survey([version], out, 1, lambda line: None, worker="tests.versions.fake_worker")
    return {result.probe: result for result in read(out)}


def test_results_are_kept_and_what_is_missing_did_not_run(versions: Path, tmp_path: Path) -> None:
    wrong = [Difference("update", "embed.weight", 0.5, 2e-5)]
    install(
        versions, "0.1.0", [Result("0.1.0", FIRST, OK), Result("0.1.0", SECOND, WRONG, "", wrong)]
    )
    found = ask("0.1.0", tmp_path / "out.jsonl")
    assert found.keys() == {probe.name for probe in PROBES}
    assert found[FIRST].status == OK
    assert found[SECOND] == Result("0.1.0", SECOND, WRONG, "", wrong)
    assert {found[probe.name].status for probe in PROBES[2:]} == {NOT_RUN}


def test_only_what_did_not_run_is_asked_again(versions: Path, tmp_path: Path) -> None:
    folder = install(versions, "0.1.0", [Result("0.1.0", SECOND, OK)])
    out = tmp_path / "out.jsonl"
    append(out, Result("0.1.0", FIRST, OK))
    append(out, Result("0.1.0", SECOND, NOT_RUN, "killed"))
    found = ask("0.1.0", out)
    assert (folder / "asked").read_text().splitlines() == [probe.name for probe in PROBES[1:]]
    assert found[SECOND].status == OK


def test_a_version_that_cannot_be_imported_did_not_run(versions: Path, tmp_path: Path) -> None:
    folder = install(versions, "0.1.0", [])
    (folder / "answers").write_text("")
    (folder / "stderr").write_text("Traceback\nImportError: no torch._six")
    found = ask("0.1.0", tmp_path / "out.jsonl")
    assert found[FIRST].status == NOT_RUN
    assert found[FIRST].reason == "ImportError: no torch._six"


def test_another_version_than_asked_for_is_noticed(versions: Path, tmp_path: Path) -> None:
    install(versions, "0.1.0", [Result("0.19.8", FIRST, OK)], claims="0.19.8")
    reason = ask("0.1.0", tmp_path / "out.jsonl")[FIRST].reason
    assert "was to give DeepSpeed 0.1.0, and python imported 0.19.8 from" in reason


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match=r"out\.jsonl, line 1: no result of scripts/versions\.py"):
        read(tmp_path / "out.jsonl")


def test_releases_come_from_pip_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(*words: str) -> environments.Done:
        text = (
            "deepspeed (0.19.8)\nAvailable versions: 0.19.8, 0.18.10, 0.18.9, 0.17.5, 0.18.0rc1\n"
        )
        return environments.Done([], 0, text, "")

    monkeypatch.setattr(environments, "_pip", pip)
    assert environments.released("0.18.0") == ["0.18.9", "0.18.10", "0.19.8"]
    with pytest.raises(UserError, match="the newest version that pip finds is"):
        environments.released("1.0")
    with pytest.raises(UserError, match="'newest' is no version of DeepSpeed"):
        environments.released("newest")


def test_any_two_options_meet_in_a_combination() -> None:
    rows = covering(AXES)
    for one, values in AXES.items():
        for other, more in AXES.items():
            if one != other:
                met = {(row[one], row[other]) for row in rows}
                assert met == {(a, b) for a in values for b in more}
    assert len(rows) < 15  # of 2592
