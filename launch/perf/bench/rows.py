"""The rows of a benchmark: the plain loop, the recipe, the recipe with a lever or other keys, and peers."""

import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from launch.config.layout import Layout, plan_layout
from launch.config.load import load_recipe
from launch.config.resolve import resolve
from launch.config.schema import GPTModel, Recipe
from launch.ds_json.view import block, is_enabled, optimizer_block
from launch.errors import UserError
from launch.perf.levers import Lever, Setting
from launch.perf.peers.run import check_names, why_not, with_keys

Kind = Literal["plain", "layerwise", "recipe", "peer"]
PLAIN, LAYERWISE = "plain loop", "layer-wise"
# In a row's text, beside the recipe's keys.
RANKS, PEER, JSON = "ranks=", "peer=", "json."


@dataclass(frozen=True)
class Row:
    """One configuration to time.

    Attributes:
        name: in the table.
        kind: what runs: the plain loop, the same layer by layer, the recipe's layout, or a peer.
        recipe: with the overrides.
        ranks: the number of devices.
        overrides: what distinguishes the row from the recipe on the command line.
        peer: which, for that kind.
        json_keys: `KEY=VALUE` for the peer's DeepSpeed JSON, such as recipes may reject.
    """

    name: str
    kind: Kind
    recipe: Recipe
    ranks: int
    overrides: tuple[str, ...] = ()
    peer: str = ""
    json_keys: tuple[str, ...] = ()

    @property
    def processes(self) -> int:
        """One a device; but layer-wise, one for all of them."""
        return 1 if self.kind == "layerwise" else self.ranks

    @cached_property
    def layout(self) -> Layout:
        """The processes' layout."""
        return plan_layout(self.recipe, self.processes)

    @cached_property
    def ds_config(self) -> dict[str, Any]:
        """The resolved JSON."""
        return resolve(self.recipe, self.layout)

    @cached_property
    def incomparable(self) -> str | None:
        """Why one device cannot train the same step by step, or None; see `check_comparable`."""
        from launch.parity.run import check_comparable

        try:
            check_comparable(self.recipe, self.ds_config)
        except UserError as error:
            return str(error)
        return None

    @cached_property
    def trains(self) -> str:
        """A digest of what is trained: rows with the same one have the same losses.

        The model, the data, the steps, the optimizer and the precision are in it; how the work is divided
        and computed is not.
        """
        model, train = self.recipe.model, self.recipe.train
        kind, settings = optimizer_block(self.ds_config)
        precisions = ("bf16", "fp16", "torch_autocast")
        parts: list[Any] = [
            {"shape": asdict(model.shape), "init_from": model.init_from}
            if isinstance(model, GPTModel)
            else model.model_dump(exclude={"checkpoint_activations"}),
            self.recipe.data.model_dump(exclude={"cache_dir"}),
            train.model_dump(include={"steps", "global_batch_size", "seed", "schedule"}),
            [is_enabled(self.ds_config, name) for name in precisions],
            [block(self.ds_config, "torch_autocast").get("dtype")],
            [block(self.ds_config, "fp16").get("loss_scale")],
            [self.ds_config["gradient_clipping"]],
            [kind.lower(), *(settings.get(key) for key in ("lr", "betas", "eps", "weight_decay"))],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Sweep:
    """What to time, as asked for on the command line; `sets` are its `--set` overrides."""

    config: str
    sets: tuple[str, ...]
    ranks: int
    levers: Sequence[Lever] = ()
    all_levers: bool = False
    rows: Sequence[str] = ()
    peers: Sequence[str] = ()
    layerwise: bool = False


def plan_rows(sweep: Sweep, skipped: Callable[[str, str], None]) -> list[Row]:
    """The rows to time; for each that is trained otherwise, a plain loop comes before it.

    Args:
        sweep: what to time.
        skipped: is given the name of each lever and peer that does not apply, and why.

    Raises:
        UserError: if the recipe, or a row that was written out, does not fit its ranks or its JSON.
    """
    recipe = load_recipe(sweep.config, sweep.sets)
    base = Row(recipe.deepspeed["config"], "recipe", recipe, sweep.ranks)
    if base.incomparable:
        raise UserError(base.incomparable)
    rows = [base]
    if sweep.layerwise:
        rows.insert(0, _layerwise(base))
    for lever in sweep.levers:
        changed = _with_lever(base, lever, sweep)
        if isinstance(changed, Row):
            rows.append(changed)
        elif not sweep.all_levers or changed:
            skipped(lever.name, changed or "the recipe has it already")
    rows += [_written(text, base, sweep) for text in sweep.rows]
    for peer in sweep.peers:
        if reason := why_not(peer, recipe, base.ds_config, sweep.ranks):
            skipped(peer, reason)
        else:
            rows.append(replace(base, name=peer, kind="peer", peer=peer))
    names = [row.name for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--row: two rows are called '{name}'; name each in its own way")
    return with_plain_loops(rows)


def with_plain_loops(rows: Iterable[Row]) -> list[Row]:
    """The rows, and before the first row that trains something a plain loop that trains the same."""
    found: list[Row] = []
    seen: set[str] = set()
    for row in rows:
        if row.incomparable is None and row.trains not in seen:
            name = PLAIN if not seen else f"{PLAIN} of {row.name}"
            alone = row.recipe.on_one_device(row.layout.micro_batch)
            found.append(Row(name, "plain", alone, 1, row.overrides))
            seen.add(row.trains)
        found.append(row)
    return found


def _layerwise(base: Row) -> Row:
    model = base.recipe.model
    if base.ranks == 1 or not isinstance(model, GPTModel):
        raise UserError("--layerwise: it spreads the layers of a family gpt over 2 or more devices")
    if model.shape.layers < base.ranks:
        raise UserError(
            f"--layerwise: {base.ranks} devices are more than the model's {model.shape.layers} blocks; "
            "lower --ranks"
        )
    # One process computes what one device would.
    alone = base.recipe.on_one_device(base.layout.micro_batch)
    return replace(base, name=LAYERWISE, kind="layerwise", recipe=alone)


def _with_lever(base: Row, lever: Lever, sweep: Sweep) -> Row | str:
    """The recipe with a lever; or why it does not apply, empty if the recipe is so already."""
    setting = Setting(base.recipe, base.layout, base.ds_config)
    if reason := lever.why_not(setting):
        return reason
    overrides = lever.overrides(setting)
    try:
        recipe = load_recipe(sweep.config, [*sweep.sets, *overrides])
        row = Row(lever.name, "recipe", recipe, base.ranks, overrides)
        same = (row.recipe.model_copy(update={"deepspeed": {}}), row.ds_config, row.layout) == (
            base.recipe.model_copy(update={"deepspeed": {}}), base.ds_config, base.layout
        )  # fmt: skip
    except UserError as error:
        return str(error)
    return "" if same else row


def _written(text: str, base: Row, sweep: Sweep) -> Row:
    """The row of `NAME: KEY=VALUE ...`.

    Among the keys may be `ranks=N`, the number of its ranks; `peer=NAME`, which trains the row's recipe;
    and for DeepSpeed by itself `json.KEY=VALUE`, a key of its JSON.
    """
    name, colon, words = text.partition(":")
    name = name.strip()
    if not colon or not name:
        raise UserError(f"--row '{text}': write NAME: KEY=VALUE KEY=VALUE")
    try:
        written = tuple(shlex.split(words))
    except ValueError as error:
        raise UserError(f"--row '{text}': {error}") from None
    overrides = list(written)
    ranks, peer = base.ranks, ""
    for number in _taken(overrides, RANKS):
        if not number.isdecimal() or not 0 < int(number) <= base.ranks:
            raise UserError(
                f"--row {name}: {RANKS}{number}: use 1 to {base.ranks}, the number of --ranks"
            )
        ranks = int(number)
    for peer in _taken(overrides, PEER):
        check_names([peer], f"--row {name}: {PEER[:-1]}")
    keys = tuple(_taken(overrides, JSON))
    if keys and peer != "raw_deepspeed":
        raise UserError(
            f"--row {name}: {JSON}{keys[0]}: add {PEER}raw_deepspeed, or write deepspeed.{keys[0]}"
        )
    try:
        recipe = load_recipe(sweep.config, [*sweep.sets, *overrides])
        row = Row(name, "peer" if peer else "recipe", recipe, ranks, written, peer, keys)
        _ = row.trains  # its layout and its JSON are checked now, before anything is timed
        with_keys(row.ds_config, keys)
        if peer and (reason := why_not(peer, recipe, row.ds_config, ranks)):
            raise UserError(f"{PEER}{peer}: {reason}")
    except UserError as error:
        raise UserError(f"--row {name}: {error}") from None
    return row


def _taken(words: list[str], start: str) -> list[str]:
    """Take the words that begin so out of the list; returns what follows."""
    found = [word for word in words if word.startswith(start)]
    words[:] = [word for word in words if word not in found]
    return [word.removeprefix(start) for word in found]
