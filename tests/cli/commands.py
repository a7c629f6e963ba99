"""The real commands, in a session of their own, and that nothing of them is left afterwards."""

import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from launch.paths import ROOT
from launch.runtime.local_launcher import free_port, rank_environment
from tests.ranks import run_ranks
from tests.resume.runs import write_text

GONE_WITHIN_SECONDS = 300.0
COMMAND_SECONDS = 1000.0
DEEPSPEED = Path(sys.executable).with_name("deepspeed")
# Of a launcher around the tests; a command started here is not one of its ranks.
OF_A_RANK = tuple(rank_environment(0, 1, 0))


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code, and stdout and stderr together."""

    code: int
    output: str

    def error(self) -> str:
        """The one `error:` line of a command that failed with nothing else to say."""
        lines = [line for line in self.output.splitlines() if re.search(r"(^|\r)error: ", line)]
        assert self.code != 0, self.output
        assert len(lines) == 1, self.output
        assert "Traceback" not in self.output, self.output
        return lines[0]


SMALL_MODEL = "{layers: 2, hidden: 32, heads: 2, vocab: 320, context: 32, dropout: 0.1}"


def write_recipe(folder: Path, model: str = SMALL_MODEL) -> Path:
    """A recipe of 37 thousand parameters on a few kB of text, which writes to `folder` only."""
    write_text(folder / "text")
    file = folder / "small.yaml"
    file.write_text(
        f"""model: {model}
data: {{source: {folder}/text, sequence_length: 32, cache_dir: {folder}/cache}}
train: {{steps: 4, global_batch_size: 8, micro_batch_size: 2, eval_batches: 1}}
deepspeed: {{config: ds_configs/zero1.json, bf16: {{enabled: false}}}}
checkpoint: {{every: 2}}
run: {{dir: {folder}/run, tensorboard: false, sample_tokens: 0}}
"""
    )
    return file


@contextmanager
def started(
    command: Sequence[str | Path], env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> Iterator["subprocess.Popen[str]"]:
    """Start a command; at the end of the block nothing of it may be left within 30 seconds."""
    inherited = {k: v for k, v in os.environ.items() if k not in OF_A_RANK}
    with subprocess.Popen(
        [str(part) for part in command], env={**inherited, **(env or {})}, cwd=cwd,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            left = _left_of(process.pid)
            for each in left:
                each.kill()
            process.kill()
    assert not left, f"left over: {left}"


def _left_of(session: int) -> list[psutil.Process]:
    deadline = time.monotonic() + GONE_WITHIN_SECONDS
    while (left := of_session(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def of_session(session: int) -> list[psutil.Process]:
    """The living processes of a session; the launcher starts no other."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            continue
    return found


def ranks_of(session: int) -> dict[int, psutil.Process]:
    """The ranks that a command has started, by their number."""
    ranks = {}
    for process in of_session(session):
        try:
            line, rank = process.cmdline(), process.environ().get("RANK")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if rank is not None and any(part.endswith("launch/train.py") for part in line):
            ranks[int(rank)] = process
    return ranks


def run(
    command: Sequence[str | Path], env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> Ended:
    """Run a command to its end."""
    with started(command, env, cwd) as process:
        output, _ = process.communicate(timeout=COMMAND_SECONDS)
    return Ended(process.returncode, output)


def train(
    recipe: Path,
    *sets: str,
    ranks: int = 0,
    resume: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> Ended:
    """Run launch/train.py with `--set` for each of `sets`; `ranks` 0: without a launcher."""
    return run(train_command(recipe, *sets, ranks=ranks, resume=resume), env, cwd)


def train_forked(
    recipe: str | Path,
    *sets: str,
    ranks: int = 0,
    resume: str | Path | None = None,
    words: Sequence[str] = (),
    port: int | None = None,
    file_limit: int | None = None,
) -> Ended:
    """`train` for less: forked off what has imported torch and DeepSpeed, in the place of a launcher.

    `words` are more of the command line; the ranks meet at `port`, or at a free one; a file may have
    `file_limit` bytes.
    """
    _, *command = train_command(Path(recipe), *sets, resume=resume)
    port = port or free_port()
    environments = [rank_environment(rank, ranks, port) for rank in range(ranks)]
    return _forked([*command, *words], environments or [{}], file_limit)


def run_forked(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Ended:
    """`run` of a Python script and its arguments, for less, as `train_forked`."""
    return _forked(command, [dict(env or {})])


def _forked(
    command: Sequence[str | Path], environments: list[dict[str, str]], file_limit: int | None = None
) -> Ended:
    words = [str(part) for part in command]
    return Ended(*run_ranks(_run_entries, 1, words, environments, file_limit)[0])


def _run_entries(
    command: list[str], environments: list[dict[str, str]], file_limit: int | None
) -> tuple[int, str]:
    """Run in a rank: the entry as a script in processes of their own; the first to fail ends all."""
    read, write = os.pipe()
    running = [_forked_entry(command, each, file_limit, write) for each in environments]
    os.close(write)
    printed: list[bytes] = []
    reader = threading.Thread(
        target=lambda: printed.extend(iter(lambda: os.read(read, 65536), b""))
    )
    reader.start()
    code = 0
    while running:
        pid, status = os.wait()
        running.remove(pid)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            for other in running:
                os.kill(other, signal.SIGKILL)
    reader.join()
    return code, b"".join(printed).decode(errors="replace")


def _forked_entry(
    command: list[str], environment: dict[str, str], file_limit: int | None, output: int
) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        for name in OF_A_RANK:
            os.environ.pop(name, None)
        os.environ |= environment
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def train_command(
    recipe: Path, *sets: str, ranks: int = 0, resume: str | Path | None = None
) -> list[str | Path]:
    """The command line of `train`."""
    launcher: list[str | Path] = [sys.executable]
    if ranks:
        launcher = [DEEPSPEED, "--num_gpus", str(ranks), "--master_port", str(free_port())]
    command: list[str | Path] = [*launcher, ROOT / "launch/train.py", "--config", recipe]
    for each in sets:
        command += ["--set", each]
    return command if resume is None else [*command, "--resume", resume]


def wait_for(process: "subprocess.Popen[str]", words: str) -> str:
    """Read a command's output up to the line that holds `words`; returns what was read."""
    assert process.stdout is not None
    read = []
    for line in process.stdout:
        read.append(line)
        if words in line:
            return "".join(read)
    raise AssertionError(f"ended without '{words}':\n{''.join(read)}")


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal to one process, by its id."""
    os.kill(process.pid, number)
