"""Output of `scripts/parity.py`: a table and a plot of the differences."""

from pathlib import Path

from rich.table import Table

from launch.parity.compare import Difference
from launch.parity.run import TrainingRecord

SHOWN_TENSORS = 8
SMALLEST = 1e-10  # stands for 0 on a logarithmic axis; fp32 has no relative difference below 6e-8


def table(reference: TrainingRecord, differences: list[Difference]) -> Table:
    """Losses and gradient norms by step, the worst tensors, and the overall worst in the last row.

    `differences` come from `compare`, sorted with the worst one last.
    """
    shown = Table(title="relative difference from one device", title_justify="left")
    for name in ("quantity", "where"):
        shown.add_column(name, no_wrap=True)
    for name in ("reference", "difference", "tolerance", "used"):
        shown.add_column(name, justify="right", no_wrap=True)
    for quantity, values in (("loss", reference.losses), ("grad norm", reference.grad_norms)):
        steps = {d.where: d for d in differences if d.quantity == quantity}
        for step, value in enumerate(values, 1):
            _add(shown, steps[f"step {step}"], f"{value:.6f}")
        shown.add_section()
    tensors = [d for d in differences if d.quantity in ("weights", "key bias")]
    if hidden := len(tensors) - SHOWN_TENSORS:
        shown.add_row("weights", f"({max(hidden, 0)} tensors that are closer)")
    for difference in tensors[-SHOWN_TENSORS:]:
        _add(shown, difference, "")
    shown.add_section()
    _add(shown, differences[-1], "the worst", "bold")
    if any(d.quantity == "key bias" for d in differences):
        shown.caption = (
            "key bias: the largest absolute difference, against twice the sum of the learning rates; "
            "its gradient is zero but for rounding, and Adam makes full steps of that"
        )
        shown.caption_justify = "left"
    return shown


def _add(shown: Table, found: Difference, reference: str, style: str = "") -> None:
    shown.add_row(
        found.quantity,
        found.where,
        reference,
        f"{found.value:.1e}",
        f"{found.tolerance:.1e}",
        f"{100 * found.share:.2g}%",
        style="red" if found.past else style,
    )


def verdict(differences: list[Difference]) -> str:
    """One line: all within tolerance, or where the tolerance is first exceeded."""
    past = [d for d in differences if d.past]
    worst = differences[-1]
    if not past:
        return (
            f"parity holds: {len(differences)} comparisons; the worst, {worst.quantity} at "
            f"{worst.where}, uses {100 * worst.share:.2g}% of its tolerance"
        )
    first = min(_by_step(past), key=_step, default=worst)
    return (
        f"parity FAILS: {len(past)} of {len(differences)} comparisons are past their tolerance; the "
        f"first is {first.quantity} at {first.where}: {first.value:.1e}, and {first.tolerance:.1e} is "
        "allowed"
    )


def first_step_past(differences: list[Difference]) -> int | None:
    """The first step with a loss or grad norm past its tolerance; None if only weights are."""
    return min((_step(d) for d in _by_step(differences) if d.past), default=None)


def _by_step(differences: list[Difference]) -> list[Difference]:
    return [d for d in differences if d.quantity in ("loss", "grad norm")]


def _step(difference: Difference) -> int:
    return int(difference.where.split()[1])


def save_picture(differences: list[Difference], title: str, file: Path) -> None:
    """Plot the differences by step and those of the worst tensors, each with its tolerance."""
    # Without pyplot, which also looks for a window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)
    for quantity, colour in (("loss", "tab:blue"), ("grad norm", "tab:orange")):
        by_step = {int(d.where.split()[1]): d for d in differences if d.quantity == quantity}
        steps = sorted(by_step)
        heights = [max(by_step[step].value, SMALLEST) for step in steps]
        bounds = [by_step[step].tolerance for step in steps]
        left.semilogy(steps, heights, "o-", color=colour, label=quantity)
        left.step(
            steps, bounds, "--", where="mid", color=colour, label=f"tolerance of the {quantity}"
        )
    left.set(xlabel="step", ylabel="relative difference", title="by step")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylim(bottom=SMALLEST)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)

    tensors = [d for d in differences if d.quantity == "weights"][-SHOWN_TENSORS:]
    right.barh(
        [d.where for d in tensors],
        [max(d.value, SMALLEST) for d in tensors],
        color=["tab:red" if d.past else "tab:green" for d in tensors],
    )
    right.scatter(
        [d.tolerance for d in tensors],
        [d.where for d in tensors],
        marker="|", s=300, color="black", label="tolerance",
    )  # fmt: skip
    right.set(xscale="log", xlabel="relative difference", title="weights, the worst tensors")
    right.set_xlim(left=SMALLEST)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
