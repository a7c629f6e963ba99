"""Choose where a run starts: in a new folder, or from the newest complete checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from launch.checkpoint.folder import leftovers
from launch.checkpoint.manifest import MANIFEST, find_damage, newest_complete, read_manifest
from launch.config.schema import Recipe
from launch.errors import UserError
from launch.paths import ROOT
from launch.runtime.run_dir import RunDir, new_folder


@dataclass(frozen=True)
class Start:
    """The output folder, the checkpoint to resume from (None: step 0), and a one-line reason."""

    folder: RunDir
    checkpoint: Path | None
    message: str


def choose_start(recipe: Recipe, resume: str | None) -> Start:
    """Choose the output folder and starting point.

    `resume` is None, "auto", or the path of a run or checkpoint.

    Raises:
        UserError: if the path has no complete checkpoint, if the folder already has a run and
            `resume` is not set, or if all of its checkpoints are damaged.
    """
    parent = ROOT / "runs" / recipe.name
    fixed = RunDir(Path(recipe.run.dir).expanduser().absolute()) if recipe.run.dir else None
    if resume is None:
        if fixed and fixed.metrics.exists():
            raise UserError(
                f"run.dir: {fixed.path} already holds a run; go on with it by --resume auto, "
                "or name another folder"
            )
        fresh = fixed or RunDir(new_folder(parent))
        return Start(fresh, None, f"a new run in {fresh.path}")
    if resume != "auto":
        start = _start_at_path(Path(resume).expanduser().absolute())
        if fixed and fixed.path.resolve() != start.folder.path.resolve():
            raise UserError(
                f"--resume: it names a run in {start.folder.path}, and run.dir is {fixed.path}; "
                "leave one of the two out"
            )
        return start
    runs = [fixed] if fixed else [RunDir(p) for p in sorted(parent.glob("*"), reverse=True)]
    passed_over: list[str] = []
    for run in runs:
        found, rejected = newest_complete(run)
        if found:
            return Start(run, found, _describe(run, found, [*passed_over, *rejected]))
        if rejected:
            raise UserError(
                f"--resume auto: every checkpoint of {run.path} is damaged ({'; '.join(rejected)}); "
                "remove the folder to start from step 0"
            )
        unfinished = [path.name for path in leftovers(run)]
        if run.metrics.exists() or unfinished:
            passed_over.append(f"{run.path.name}: {', '.join(unfinished) or 'no checkpoint'}")
    where = fixed.path if fixed else parent
    fresh = fixed or RunDir(new_folder(parent))
    seen = f" (passed over {'; '.join(passed_over)})" if passed_over else ""
    message = f"no complete checkpoint under {where}{seen}: starting at step 0 in {fresh.path}"
    return Start(fresh, None, message)


def _start_at_path(path: Path) -> Start:
    if not path.is_dir():
        raise UserError(f"--resume: there is no folder {path}; give a run's or a checkpoint's")
    if path.name.startswith("step_") or (path / MANIFEST).exists():
        wrong = find_damage(path)
        if wrong:
            other, _ = newest_complete(RunDir(path.parent.parent))
            instead = (
                f"the newest complete one is {other}" if other else "its run has no complete one"
            )
            raise UserError(f"--resume: {path} is not a complete checkpoint: {wrong}; {instead}")
        run = RunDir(path.parent.parent)
        return Start(run, path, _describe(run, path, []))
    run = RunDir(path)
    found, rejected = newest_complete(run)
    if not found:
        reasons = "; ".join(rejected) or "none was saved"
        raise UserError(
            f"--resume: {path} has no complete checkpoint ({reasons}); name another run's folder, "
            "or start a new run without --resume"
        )
    return Start(run, found, _describe(run, found, rejected))


def _describe(run: RunDir, checkpoint: Path, rejected: list[str]) -> str:
    step = read_manifest(checkpoint)["step"]
    rejected = [*rejected, *(f"{path.name}: cut short" for path in leftovers(run))]
    passed_over = f" (passed over {'; '.join(rejected)})" if rejected else ""
    return f"resuming after step {step} from {checkpoint}{passed_over}"
