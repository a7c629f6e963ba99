"""Two hosts and a slow link: what crosses it is what models/README.md counts."""

import pytest

from tests.cluster.slow_links import LAYOUTS, Measured, expected, sent_a_step, train
from tests.cluster.virtual import Cluster

RATE = "200mbit"
# What two runs send unequally at their starts and ends is seen beside the little that a pipeline sends.
STEPS = {"pipeline 2": 24}
HEADERS = 0.02  # of packets; what is sent again; names and addresses asked for


@pytest.fixture(scope="module")
def slow(cluster: Cluster) -> dict[str, Measured]:
    return {layout: train(cluster, layout, RATE, steps=STEPS.get(layout, 4)) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_sends_what_the_tables_of_traffic_say(
    cluster: Cluster, slow: dict[str, Measured], layout: str
) -> None:
    short = train(cluster, layout, "unlimited", steps=2)
    for sent in sent_a_step(short, slow[layout]):
        assert sent == pytest.approx(expected(layout), rel=HEADERS)
