"""What a search found, in words: whether plain data parallelism is enough, and if not, what is."""

from dataclasses import replace

from launch.config.schema import GPTModel, Recipe
from launch.errors import UserError
from launch.planner.cards import SPARE
from launch.planner.search import Cluster, Plan, search
from models.config import count_parameters

_MOST_GPUS = 4096


def advice(plans: list[Plan]) -> str:
    """One sentence for a search of which a layout fits, fastest first.

    Raises:
        UserError: if none fits, with the shortfall and what would fit; also if none composes.
    """
    if not plans:
        raise UserError(
            "no layout composes: no number of data parallel ranks divides the global batch; change "
            "--global-batch or --gpus"
        )
    best, cluster = plans[0], plans[0].cluster
    if not best.fits:
        raise UserError(shortfall(plans))
    room = f"of {cluster.card.gib:g} GiB"
    plain = [plan for plan in plans if plan.plain]
    chosen = f"{best.name()}, {best.gib:.1f} {room}, {best.time.total:.3g} s a step"
    if not plain:
        return f"Plain data parallelism does not divide the batch; use {chosen}."
    needs = f"{plain[0].gib:.1f} GiB {room} with micro batch {plain[0].layout.micro_batch}"
    if not plain[0].fits:
        return f"Plain data parallelism does not fit (it needs {needs}): use {chosen}."
    if best.plain:
        return f"Plain data parallelism is enough: {chosen}."
    gain = plain[0].time.total / best.time.total - 1
    return (
        f"Plain data parallelism is enough ({needs}), but {best.name()} takes {best.gib:.1f} GiB and is "
        f"{gain:.0%} faster."
    )


def shortfall(plans: list[Plan]) -> str:
    """What the smallest layout lacks, and the fewest cards of this kind that would do."""
    smallest, cluster = min(plans, key=lambda plan: plan.gib), plans[0].cluster
    usable = cluster.card.gib * (1 - SPARE)
    if cluster.host_gib is not None and smallest.gib <= usable:
        lacks = f"{smallest.host_gib:.0f} GiB of host memory, and a host has {cluster.host_gib:g}"
    else:
        lacks = f"{smallest.gib:.1f} GiB a GPU, and {usable:.1f} can be used"
    return (
        f"no layout fits {cluster.describe()}: the smallest, {smallest.name()}, needs {lacks}; "
        f"{more_gpus(smallest.recipe, cluster)}"
    )


def more_gpus(recipe: Recipe, cluster: Cluster) -> str:
    """The fewest hosts of this kind that a layout fits, among doublings."""
    hosts = cluster.hosts
    while hosts * cluster.gpus < _MOST_GPUS:
        hosts *= 2
        wider = replace(cluster, hosts=hosts)
        try:
            found = search(recipe, wider)
        except UserError:
            break
        if found and found[0].fits:
            return f"{wider.ranks} of these GPUs would do: {found[0].name()}"
    return "use GPUs with more memory, or a shorter sequence"


def nearest_fit(recipe: Recipe, cluster: Cluster) -> str:
    """The fastest layout of a recipe's model that fits, in a few words; or that none does."""
    plans = search(recipe, cluster)
    if plans and plans[0].fits:
        return f"what fits is {plans[0].name()} ({plans[0].gib:.1f} GiB): {overrides(plans[0])}"
    return shortfall(plans) if plans else "no layout composes with these GPUs"


def overrides(plan: Plan) -> str:
    """The plan as `--set` arguments of its recipe."""
    parallel = plan.recipe.parallel
    words = [
        f"deepspeed.config={plan.recipe.deepspeed['config']}",
        f"train.micro_batch_size={plan.layout.micro_batch}",
        f"train.compile={str(plan.recipe.train.compile).lower()}",
        f"model.checkpoint_activations={str(plan.recipe.model.checkpoint_activations).lower()}",
        f"parallel.tensor={parallel.tensor}",
        f"parallel.pipeline={parallel.pipeline}",
        f"parallel.sequence={str(parallel.sequence).lower()}",
    ]
    return f"--set {' '.join(words)}"


def lesson_estimate(recipe: Recipe, gpus: int, stage: int, mixed: bool) -> tuple[float, float]:
    """GiB a GPU by the usual rule of thumb: all in all, and what ZeRO leaves of it.

    Weights, gradients and two moments, each of 4 bytes, or of 2 with mixed precision, and nothing else.
    `estimate` differs: in 16 bits, the moments stay in fp32 and there is an fp32 copy of the weights, so
    that it is 16 bytes or more instead of 8; and there are activations, logits and buffers.
    """
    assert isinstance(recipe.model, GPTModel)
    size = (2 if mixed else 4) * count_parameters(recipe.model.shape) / 2**30
    split = [gpus if stage >= least else 1 for least in (3, 2, 1, 1)]
    return 4 * size, sum(size / ranks for ranks in split)
