"""What the tests of tests/gpu share."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parity.cases import Workbench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    folder: Path = tmp_path_factory.mktemp("gpu")
    yield Workbench(folder)
    shutil.rmtree(folder, ignore_errors=True)
