"""Where does a layout first differ from one device? Compare what both compute, in its order.

Within a step the order is that of `PHASES`: the batch, the forward pass module by module, the loss,
the backward pass, the parameters' gradients, their norm, the learning rate, and what the optimizer
makes of them. The first difference in that order is the nearest to its cause: whatever comes before
it was right, on every rank and in every micro batch.
"""

import tempfile
from pathlib import Path

from launch.config.layout import plan_layout
from launch.config.schema import Recipe
from launch.parity import run
from launch.parity.compare import key_biases, tolerances_of
from launch.parity.places import Place, differences
from launch.parity.recorder import BEFORE, INPUT, OUTPUT, Recorder
from launch.parity.run import plan_reference, run_reference
from launch.runtime.local_launcher import run_local_ranks

SHOWN = 6  # further differences in the report


def bisect(recipe: Recipe, ranks: int, uneven: bool, steps: int) -> list[Place]:
    """Run both again for some steps, recorded, and compare; see `differences`.

    The layout is not compiled: nothing could be seen inside of compiled modules.

    Args:
        recipe: what to run; its `train.steps` is the length of the schedule.
        ranks: of the layout.
        uneven: as `plan_reference`.
        steps: how many to run.

    Raises:
        UserError: as `run_local_ranks`.
    """
    from launch.parity.layout_recorder import load_recording

    values = recipe.model_dump()
    values["train"]["compile"] = False
    plan = plan_reference(recipe, plan_layout(recipe, ranks).micro_batch, uneven)
    recorder = Recorder()
    run_reference(plan, recorder, steps)
    with tempfile.TemporaryDirectory(prefix="bisect-") as name:
        folder = Path(name)
        run_local_ranks(run.write_recording, ranks, values, folder, uneven, steps)
        recordings = {rank: load_recording(folder, rank) for rank in range(ranks)}
        limits = tolerances_of(recipe, plan.ds_config)
        return differences(recorder.recording, recordings, limits, key_biases(recipe))


def report(places: list[Place], compiled: bool) -> str:
    """What `--bisect` prints: the first place, what that says, and the next few."""
    if not places:
        return (
            "bisect: not compiled, the layout agrees with one device: the difference needs "
            "train.compile=true"
            if compiled
            else "bisect: activations, gradients and weights are all within their bounds; what is past "
            "its own is a sum of smaller differences"
        )
    first, rest = places[0], places[1 : 1 + SHOWN]
    lines = [f"bisect: {first}", f"        {MEANING[_meaning(first)]}"]
    if first.name.count("."):
        lines[1] = lines[1].replace("its parent", first.name.rpartition(".")[0])
    lines += [f"then    {place}" for place in rest]
    if hidden := len(places) - 1 - len(rest):
        lines.append(f"        and {hidden} more in step {first.step}")
    return "\n".join(lines)


MEANING = {
    BEFORE: "the layout starts from other weights than one device, or a shard is not the rank's own",
    "batch": "the ranks are not given the samples of one device's batch",
    "forward "
    + INPUT: "what is before it is right: look at what its parent does before it calls it",
    "forward " + OUTPUT: "its input is right: look into the module, and at its copy of the weights",
    "loss": "the forward pass is right: look at the loss, its denominator, and its sum over the ranks",
    "backward gradient of "
    + OUTPUT: "what comes after it is right: look at what its parent does with "
    "its output, and at what sends the gradient back",
    "backward gradient of "
    + INPUT: "the gradient of its output is right: look into its backward pass",
    "parameter gradients": "activations have their gradients: look at how those of weights are summed, "
    "over micro batches, ranks and tied copies",
    "grad norm": "the gradients are right: look at which ranks count which of them",
    "learning rate": "look at the schedule, and at when it is stepped",
    "first moments": "gradients and their norm are right: look at the clip, and at the optimizer",
    "weights": "what the optimizer is given is right: look at its step, and at weight decay",
}


def _meaning(place: Place) -> str:
    passes = place.phase in ("forward", "backward")
    return f"{place.phase} {place.quantity}" if passes else place.phase
