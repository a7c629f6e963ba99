"""The page made of results: what is wrong in which version of DeepSpeed, in Markdown."""

from collections.abc import Callable, Iterable, Sequence

from launch.versions.compositions import COMBINATIONS, FEATURES, PROBES
from launch.versions.environments import as_numbers
from launch.versions.issues import ISSUES
from launch.versions.probes import STEPS, Probe
from launch.versions.results import NOT_RUN, NOT_THERE, OK, WRONG, Difference, Result

HEADER = """\
# Which DeepSpeed version computes right

Each released version of DeepSpeed trained a tiny model in {probes} compositions of its features, {steps}
steps each, and plain PyTorch trained the same on one device: same weights, same data. A composition is
wrong where a loss, a gradient norm, or what the steps added to a weight differs by more than rounding can.

Made by one command. It installs each version into a folder of its own beside the same torch, and takes
one to three minutes for each on two CPU cores:

```bash
python scripts/versions.py --out DEEPSPEED_VERSIONS.jsonl --table DEEPSPEED_VERSIONS.md
```

{run}, on CPUs with gloo and 2 or 4 ranks. [DEEPSPEED_VERSIONS.jsonl](DEEPSPEED_VERSIONS.jsonl) has the
numbers, [compositions.py](launch/versions/compositions.py) the compositions, and
[results.py](launch/versions/results.py) the bounds. Not in it: NCCL, CUDA streams, DeepSpeed's own kernels
(the optimizers are torch's), NVMe, tensor and sequence parallelism, experts. "Nothing seen" is not "nothing
wrong".
"""


class Survey:
    """Results by version and probe."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = list(results)
        self.found = {(result.deepspeed, result.probe): result for result in results}
        self.versions = sorted({result.deepspeed for result in results}, key=as_numbers)

    def of(self, version: str, probes: Iterable[Probe]) -> list[Result]:
        """The results of some probes under a version, as far as there are any."""
        return [self.found[version, p.name] for p in probes if (version, p.name) in self.found]

    def ranges(self, shows: Callable[[str], bool]) -> str:
        """The versions that show something: "0.17.6 to 0.18.2, 0.19.0"; "" for none."""
        parts: list[list[str]] = []
        before = False
        for version in self.versions:
            now = shows(version)
            if now and before:
                parts[-1] = [parts[-1][0], version]
            elif now:
                parts.append([version])
            before = now
        return ", ".join(" to ".join(part) for part in parts)


def page(results: Sequence[Result]) -> str:
    """The whole page."""
    survey = Survey(results)
    head = HEADER.format(
        probes=len(PROBES),
        steps=STEPS,
        run="; ".join(sorted({result.run for result in results if result.run})),
    )
    parts = (_by_version, _by_feature, _by_issue, _combinations, _not_run)
    return "\n".join([head, *(part(survey) for part in parts)])


def _features() -> dict[str, list[Probe]]:
    return {name: [p for p in PROBES if p.feature == name] for name in FEATURES}


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _by_version(survey: Survey) -> str:
    lines = ["## In short", "", _row(["version", "wrong in", "did not run"]), _row(["---"] * 3)]
    for version in reversed(survey.versions):
        states = {name: _cell(survey.of(version, probes)) for name, probes in _features().items()}
        wrong = [f"{name} ({cell.strip('*')})" for name, cell in states.items() if "**" in cell]
        hung = [name for name, cell in states.items() if cell == NOT_RUN]
        lines.append(_row([version, ", ".join(wrong) or "nothing seen", ", ".join(hung) or "-"]))
    return "\n".join([*lines, ""])


def _cell(results: Sequence[Result]) -> str:
    """A feature under a version: the worst of its probes."""
    wrong = [result for result in results if result.status == WRONG]
    if wrong:
        return f"**{_how_wrong(wrong)}**"
    states = {result.status for result in results}
    if NOT_RUN in states:
        return NOT_RUN
    return OK if OK in states else "-" if states == {NOT_THERE} else ""


def _how_wrong(results: Sequence[Result]) -> str:
    """What is past its bound, and how far off at most: weights before losses, norms last."""
    past = [(each, r.reason) for r in results for each in r.differences if each.share > 1.0]
    for quantity, word in (("update", ""), ("loss", "loss "), ("gradient norm", "norm ")):
        values = [pair for pair in past if pair[0].quantity == quantity]
        if values:
            # What is wrong each time says more than what is wrong now and then.
            worst, runs = max(values, key=lambda pair: (not pair[1], pair[0].share))
            return f"{word}{_relative(worst)} {runs}".rstrip()
    raise ValueError(f"nothing is past its bound in {results}")


def _relative(difference: Difference) -> str:
    value = difference.value
    if not value < float("inf"):
        return "not finite"
    if value >= 10:
        return f"{value:,.0f}x"
    return f"{value:.0%}" if value >= 0.01 else f"{value:.0e}"


def _by_feature(survey: Survey) -> str:
    lines = [
        "## Version by version",
        "",
        "A percentage is how far the worst weight's update (all steps together) is off, relative to the",
        'right one: 100% where a weight stayed as it was, or moved twice as far. "norm": the weights are',
        'right, and the gradient norm that DeepSpeed tells is not. "-": the version has no such feature.',
        'Empty: not measured. "in 1 of 3 runs": repeated, it was right; ZeRO-3 in older versions is now',
        "and then not finite on CPUs. What is right ran once.",
        "",
        _row(["", *survey.versions]),
        _row(["---"] * (len(survey.versions) + 1)),
    ]
    for name, probes in _features().items():
        cells = [_cell(survey.of(version, probes)) for version in survey.versions]
        lines.append(_row([name, *cells]))
    return "\n".join([*lines, ""])


def _by_issue(survey: Survey) -> str:
    lines = [
        "## Issues of DeepSpeed that this finds",
        "",
        "The versions are those whose weights were wrong here in what the issue describes; no version is",
        "written down in the code.",
        "",
        _row(["issue", "what is wrong", "wrong here in"]),
        _row(["---"] * 3),
    ]
    for issue in ISSUES:
        probes = [probe for probe in PROBES if probe.name in issue.probes]

        def shows(version: str, probes: Sequence[Probe] = probes) -> bool:
            found = survey.of(version, probes)
            return bool(found) and all(_weights_wrong(result) for result in found)

        links = [
            f"[{n}](https://github.com/deepspeedai/DeepSpeed/issues/{n})" for n in issue.numbers
        ]
        lines.append(_row([", ".join(links), issue.text, survey.ranges(shows) or "not seen"]))
    return "\n".join([*lines, ""])


def _weights_wrong(result: Result) -> bool:
    past = {each.quantity for each in result.differences if each.share > 1.0}
    return bool(past - {"gradient norm"})


def _combinations(survey: Survey) -> str:
    lines = [
        "## Combinations of options",
        "",
        "Any two of ten options meet in one of these. Those with accumulation or a CPU optimizer show",
        "defects of the table above again. The one at ZeRO-1 in bf16 whose gradients are not contiguous",
        "is wrong on CPUs alone: DeepSpeed sorted gradients by CUDA's names of dtypes, and left the others",
        "out of the all-reduce. With that repaired by hand it is right in 0.19.0.",
        "",
        _row(["combination", "wrong in"]),
        _row(["---"] * 2),
    ]
    for probe in PROBES:
        if probe.feature == COMBINATIONS:
            wrong = {
                r.deepspeed for r in survey.results if r.probe == probe.name and r.status == WRONG
            }
            name = probe.name.removeprefix(f"{COMBINATIONS}: ")
            lines.append(_row([name, survey.ranges(wrong.__contains__) or "-"]))
    return "\n".join([*lines, ""])


def _not_run(survey: Survey) -> str:
    """Each reason once, with its probe and the versions."""
    seen: dict[tuple[str, str], set[str]] = {}
    for result in survey.results:
        if result.status == NOT_RUN:
            seen.setdefault((result.probe, result.reason), set()).add(result.deepspeed)
    if not seen:
        return "## Did not run\n\nNothing: every version ran every composition that it has.\n"
    lines = ["## Did not run", "", _row(["composition", "versions", "why"]), _row(["---"] * 3)]
    for (probe, reason), versions in seen.items():
        named = survey.ranges(versions.__contains__)
        lines.append(_row([probe, named, "`" + reason.replace("|", "/").replace("`", "'") + "`"]))
    return "\n".join([*lines, ""])
