"""The page says what the results say; and the page that is committed is made of the committed results."""

import pytest

from launch.paths import ROOT
from launch.versions.compositions import FEATURES, PROBES
from launch.versions.issues import ISSUES
from launch.versions.results import NOT_RUN, NOT_THERE, OK, WRONG, Difference, Result, read
from launch.versions.table import page

RESULTS, PAGE = ROOT / "DEEPSPEED_VERSIONS.jsonl", ROOT / "DEEPSPEED_VERSIONS.md"
UPDATE = Difference("update", "embed.weight", 0.894, 2e-5)
NORM = Difference("gradient norm", "step 2", 1023.4, 5e-6)


def probes_of(number: int) -> tuple[str, ...]:
    (issue,) = [issue for issue in ISSUES if number in issue.numbers]
    return issue.probes


def results() -> list[Result]:
    """ZeRO-2 wrong in two of four versions, a norm in one, Muon absent or not running."""
    found = []
    for version in ("0.9.0", "0.9.9", "0.10.0", "0.11.0"):
        for probe in PROBES:
            result = Result(version, probe.name, OK, run="torch 9.9")
            if probe.name in probes_of(7718) and version in ("0.9.9", "0.10.0"):
                result.status, result.differences = WRONG, [NORM, UPDATE]
            elif probe.name in probes_of(8393) and version == "0.9.0":
                result.status, result.differences = WRONG, [NORM]
            elif probe.feature == "torch_autocast":
                result.status = NOT_THERE if version == "0.9.0" else OK
            elif probe.name in probes_of(8432) and version != "0.9.0":
                result.status, result.reason = NOT_RUN, "Exception: a | b"
            found.append(result)
    return found


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return page(results()).splitlines()


@pytest.mark.parametrize(
    "row",
    [
        "|  | 0.9.0 | 0.9.9 | 0.10.0 | 0.11.0 |",
        "| ZeRO-2, accumulation | ok | **89%** | **89%** | ok |",
        "| torch_autocast | - | ok | ok | ok |",
        "| stage 0, fp16 | **norm 1,023x** | ok | ok | ok |",
        "| Muon, fp16, overflow | ok | not run | not run | not run |",
        "| 0.11.0 | nothing seen | Muon, fp16, overflow |",
        "| 0.10.0 | ZeRO-2, accumulation (89%) | Muon, fp16, overflow |",
        "| 0.9.0 | stage 0, fp16 (norm 1,023x) | - |",
        f"| {probes_of(8432)[0]} | 0.9.9 to 0.11.0 | `Exception: a / b` |",
    ],
)
def test_rows(lines: list[str], row: str) -> None:
    assert row in lines


@pytest.mark.parametrize(
    ("issue", "versions"), [(7718, "0.9.9 to 0.10.0"), (8393, "not seen"), (7985, "not seen")]
)
def test_issues_are_seen_where_weights_are_wrong(
    lines: list[str], issue: int, versions: str
) -> None:
    (row,) = [line for line in lines if line.startswith(f"| [{issue}](")]
    assert row.endswith(f"| {versions} |")


def test_the_committed_page_is_made_of_the_committed_results() -> None:
    assert PAGE.read_text() == page(read(RESULTS)), "python scripts/versions.py --table ..."


def test_issues_name_probes_that_there_are() -> None:
    assert {name for issue in ISSUES for name in issue.probes} <= {probe.name for probe in PROBES}


def test_the_committed_results_are_of_the_probes_that_there_are() -> None:
    assert {result.probe for result in read(RESULTS)} == {probe.name for probe in PROBES}
    assert all(f"| {feature} | " in PAGE.read_text() for feature in FEATURES)
