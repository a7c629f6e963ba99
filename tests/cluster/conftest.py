"""Two virtual hosts for all tests of this folder."""

from collections.abc import Iterator

import pytest

from launch.cluster.record import INDEX
from launch.errors import UserError
from tests.cluster.virtual import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of two hosts; where this machine cannot hold one, the test fails in one line."""
    made, refused = Cluster(), ""
    try:
        try:
            made.up()
        except UserError as error:
            refused = str(error)
        if refused:  # said here, where no traceback comes before it
            pytest.fail(refused, pytrace=False)
        yield made
    finally:
        made.down()
        _forget_jobs_in(str(made.folder))


def _forget_jobs_in(folder: str) -> None:
    """Take what the tests have submitted out of the list of a person's own jobs."""
    if INDEX.exists():
        kept = [line for line in INDEX.read_text().splitlines(keepends=True) if folder not in line]
        INDEX.write_text("".join(kept))
