"""What the parity tests share."""

from pathlib import Path

import pytest

from tests.parity.cases import Workbench
from tests.parity.faults.bench import FaultBench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    folder: Path = tmp_path_factory.mktemp("parity")
    return Workbench(folder)


@pytest.fixture(scope="session")
def fault_bench(tmp_path_factory: pytest.TempPathFactory) -> FaultBench:
    return FaultBench(tmp_path_factory.mktemp("faults"))
