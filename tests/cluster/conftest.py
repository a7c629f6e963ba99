"""Two virtual hosts for all tests of this folder."""

from collections.abc import Iterator

import pytest

from launch.cluster.job_store import INDEX
from launch.errors import UserError
from tests.cluster.virtual import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of two hosts; where this machine cannot hold one, the test fails in one line."""
    made, rejected = Cluster(), ""
    try:
        try:
            made.up()
        except UserError as error:
            rejected = str(error)
        if rejected:  # said here, where no traceback comes before it
            pytest.fail(rejected, pytrace=False)
        # The list of what was submitted is a person's own; jobs of the tests go into another.
        jobs = made.folder / "submitted"
        for folder in (INDEX.parent, jobs):
            folder.mkdir(parents=True, exist_ok=True)
        with made.replace(made.hub, INDEX.parent, jobs):
            yield made
    finally:
        made.down()
