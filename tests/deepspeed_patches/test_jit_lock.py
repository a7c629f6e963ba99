"""Raw DeepSpeed shows the defect that `launch/deepspeed_patches/jit_lock.py` works around.

A test here fails once DeepSpeed has repaired the defect; its message names the workaround to remove.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed_patches.raw import repaired
from tests.ranks import run_ranks


def load_an_op() -> None:
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils.file_baton import FileBaton

    def wait(self: FileBaton) -> None:
        raise TimeoutError(self.lock_file_path)  # the real one sleeps while the file exists

    baton: Any = FileBaton
    baton.wait = wait
    CPUAdamBuilder().load()


def test_a_lock_of_a_killed_build_is_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    try:
        run_ranks(load_an_op, 1, env={"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    except TimeoutError as waited:
        assert str(waited) == str(lock)
    else:
        pytest.fail(repaired("jit_lock.wait_for_lock_owner"))
