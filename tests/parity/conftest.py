"""What the parity tests share."""

from pathlib import Path

import pytest

from tests.parity.cases import Workbench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    folder: Path = tmp_path_factory.mktemp("parity")
    return Workbench(folder)
