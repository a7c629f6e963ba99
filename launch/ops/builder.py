"""Build DeepSpeed's C++ ops ahead of time; it would compile them silently when training starts.

An interrupted build does no harm: see `launch/deepspeed_patches/jit_lock.py`.
"""

import fcntl
import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from launch.deepspeed_patches.jit_lock import is_held, load_built_op, wait_for_lock_owner
from launch.ds_json.view import offload_device, optimizer_block, zero_stage
from launch.errors import UserError
from launch.ops.sources import compile_faster
from launch.paths import ROOT
from launch.runtime.locks import acquire


class _Op(NamedTuple):
    builder: str
    minutes: str  # build time on two cores, shown to the user
    first: tuple[str, ...] = ()  # ops that must be loaded before it, for their symbols


OPS = {
    "cpu_adam": _Op("CPUAdamBuilder", "about a minute"),
    "cpu_adagrad": _Op("CPUAdagradBuilder", "about a minute"),
    "cpu_lion": _Op("CPULionBuilder", "about a minute"),
    "fused_adam": _Op("FusedAdamBuilder", "about a minute"),
    "fused_lamb": _Op("FusedLambBuilder", "about a minute"),
    "fused_lion": _Op("FusedLionBuilder", "about a minute"),
    "pin_memory": _Op("PinMemoryBuilder", "about half a minute"),
    "async_io": _Op("AsyncIOBuilder", "about a minute", first=("pin_memory",)),
}
# Optimizer in the JSON -> the op without and with optimizer offload (DeepSpeedEngine,
# _configure_basic_optimizer); None if torch's own optimizer is used.
_OPTIMIZER_OPS: dict[str, tuple[str | None, str]] = {
    "adam": ("fused_adam", "cpu_adam"),
    "adamw": ("fused_adam", "cpu_adam"),
    "muon": ("fused_adam", "cpu_adam"),
    "adagrad": (None, "cpu_adagrad"),
    "lion": ("fused_lion", "cpu_lion"),
    "lamb": ("fused_lamb", "fused_lamb"),
}
STAMP = "built_for.txt"
LOADS_WITHIN_SECONDS = 2.0  # a built op


def use_private_cache() -> Path:
    """Build into this checkout's `.cache`, separately per torch and Python; return the folder.

    TORCH_EXTENSIONS_DIR takes precedence if set. Call this before importing deepspeed.
    """
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    folder = ROOT / ".cache/torch_extensions" / f"{importlib.metadata.version('torch')}-{python}"
    return Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder)))


def ops_needed(ds_config: dict[str, Any]) -> list[str]:
    """The ops that DeepSpeed's engine loads for this JSON, in load order."""
    optimizer_at, parameters_at = (
        offload_device(ds_config, key) for key in ("offload_optimizer", "offload_param")
    )
    kind, params = optimizer_block(ds_config)
    plain, offloaded = _OPTIMIZER_OPS.get(kind.lower(), (None, None))
    needed = [offloaded if optimizer_at in ("cpu", "nvme") else plain]
    if params.get("torch_adam"):
        needed = []
    # Below stage 3 DeepSpeed keeps an "nvme" optimizer in memory.
    if zero_stage(ds_config) == 3 and "nvme" in (optimizer_at, parameters_at):
        needed.append("async_io")
    return [name for name in needed if name is not None]


def build_ops(names: Iterable[str], say: Callable[[str], None]) -> None:
    """Load the ops in this process, building them first if necessary.

    Safe to call from any number of processes at once: one builds, the others wait.

    Args:
        names: keys of `OPS`.
        say: called with one line before each build, because a build takes minutes.

    Raises:
        UserError: when a compiler, header or library is missing (with the command that installs
            it), or when the compiler fails (with the log file).
    """
    for name in names:
        for each in (*OPS[name].first, name):
            _make_ready(each, say)


def built_ops() -> list[str]:
    """The built ops in the cache."""
    return sorted(stamp.parent.name for stamp in use_private_cache().glob(f"*/{STAMP}"))


def stale_locks() -> list[Path]:
    """Locks of killed builds, in our cache and torch's, on which DeepSpeed would wait forever."""
    places = (use_private_cache(), Path("~/.cache/torch_extensions").expanduser())

    def found() -> set[Path]:
        locks = (lock for place in places for lock in place.glob("**/lock"))
        return {lock for lock in locks if not is_held(lock) and not _is_building(lock.parent)}

    stale = found()
    if stale:  # by then, another host that is only loading an op has released its lock
        time.sleep(LOADS_WITHIN_SECONDS)
        stale &= found()
    return sorted(stale)


def _own_lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.building")


def _is_building(folder: Path) -> bool:
    """Whether `build_ops` builds into this folder, perhaps in a container or on a host that shares it."""
    try:
        with _own_lock(folder).open() as ours:  # shared, so that two that ask do not see each other
            fcntl.flock(ours, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _make_ready(name: str, say: Callable[[str], None]) -> None:
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(OPS[name].builder)
    if builder is None:
        raise UserError(f"{name}: DeepSpeed has no such op for '{get_accelerator().device_name()}'")
    folder = use_private_cache() / name
    if not _load_built(builder, name, folder):
        with _locked(folder):
            if not _load_built(builder, name, folder):
                _build(builder, name, folder, say)
    builder.load()  # now only a look-up; pin_memory exports its symbols for async_io here


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(_own_lock(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        acquire(lock)
    except OSError as error:
        raise UserError(
            f"{folder.parent}: cannot build DeepSpeed's ops there ({error.strerror}); set "
            "TORCH_EXTENSIONS_DIR to a writable folder on a disk with locks"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _load_built(builder: Any, name: str, folder: Path) -> bool:
    """Load a build for this machine and these versions; False if there is none."""
    if name in builder._loaded_ops:
        return True
    library = folder / f"{name}.so"
    stamp = folder / STAMP
    if not stamp.is_file() or stamp.read_text() != _built_for(name) or not library.is_file():
        return False
    load_built_op(builder, name, library)
    return True


def _build(builder: Any, name: str, folder: Path, say: Callable[[str], None]) -> None:
    """Compile. The caller must hold the lock."""
    _check_tools(builder, name)
    if wait_for_lock_owner(folder / "lock"):
        say(f"{name}: an earlier build was cut off and left a lock file; building it again")
        _remove(folder)  # entirely: an orphaned compiler may still write there
    elif (folder / STAMP).exists():
        _remove(
            folder
        )  # built for another machine or version, which the build tool does not notice
    say(f"building {name} once, {OPS[name].minutes} ...")
    if _on_cpu():
        compile_faster(builder, folder)
    try:
        builder.load(verbose=False)
    except Exception as error:
        log = folder.parent / f"{name}.log"
        log.write_text(f"{error}\n")
        raise UserError(f"{name}: the build failed; what the compiler said is in {log}") from error
    partial = folder / f"{STAMP}.{os.getpid()}"
    partial.write_text(_built_for(name))
    partial.replace(folder / STAMP)


def _on_cpu() -> bool:
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().device_name() == "cpu")


def _remove(folder: Path) -> None:
    """Rename before removing: a partly removed folder must not be mistaken for a build."""
    away = folder.with_name(f"{folder.name}.old{os.getpid()}")
    folder.rename(away)
    shutil.rmtree(away)


def _built_for(name: str) -> str:
    """What a build depends on: different machines may share a checkout."""
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():  # compiled with -march=native
        flags = [
            line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))
        ]
        cpu += " " + sha256("".join(flags[:1]).encode()).hexdigest()[:16]
    versions = [
        f"{package} {importlib.metadata.version(package)}" for package in ("torch", "deepspeed")
    ]
    return "\n".join([*versions, f"python {platform.python_version()}", cpu, _gpu(name), ""])


def _gpu(name: str) -> str:
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cuda" or name.startswith("cpu_"):
        return "no GPU"
    import torch

    return f"cuda {torch.version.cuda} {torch.cuda.get_device_capability()}"


def _check_tools(builder: Any, name: str) -> None:
    """Check for missing tools before compiling, for a clear error message.

    Raises:
        UserError: with the command that installs the missing tool.
    """
    # pip installs ninja next to python; with `.venv/bin/python script.py` that is not on the PATH.
    beside = str(Path(sys.executable).parent)
    if beside not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = beside + os.pathsep + os.environ.get("PATH", "")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"{name}: DeepSpeed compiles this op and there is no C++ compiler ({compiler}); "
            "apt-get install g++"
        )
    if shutil.which("ninja") is None:
        raise UserError(f"{name}: DeepSpeed compiles this op with ninja; pip install ninja")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        raise UserError(
            f"{name}: DeepSpeed compiles this op and {header} is missing; apt-get install "
            f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        )
    if not name.startswith("cpu_") and name != "pin_memory":
        _check_nvcc(name)
    if name == "async_io" and not builder.is_compatible():
        raise UserError(
            "async_io: NVMe offload needs libaio's headers; apt-get install libaio-dev "
            "(or offload to the device 'cpu')"
        )


def _check_nvcc(name: str) -> None:
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    if get_accelerator().device_name() == "cuda":
        home = cpp_extension.CUDA_HOME
        if home is None or not Path(home, "bin", "nvcc").is_file():
            raise UserError(
                f"{name}: on a GPU DeepSpeed compiles this op with nvcc, which is missing; install "
                "the CUDA toolkit and set CUDA_HOME, or choose a config without this op "
                "(torch_adam: true instead of fused_adam, device cpu instead of nvme)"
            )
