"""Two hosts and a slow link: what crosses it is what models/README.md counts."""

import pytest

from tests.benchmarks.slow_links import LAYOUTS, expected, sent_a_step, train
from tests.cluster.virtual import Cluster

RATE = "200mbit"
# What two runs send unequally at their starts and ends is seen beside the little that a pipeline sends.
STEPS = {"pipeline 2": 24}
HEADERS = 0.02  # of packets; what is sent again; names and addresses asked for


@pytest.mark.matrix  # what the ranks of one machine send is compared with the same tables
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_sends_what_the_tables_of_traffic_say(cluster: Cluster, layout: str) -> None:
    slow = train(cluster, layout, RATE, steps=STEPS.get(layout, 4))
    short = train(cluster, layout, "unlimited", steps=2)
    for sent in sent_a_step(short, slow):
        assert sent == pytest.approx(expected(layout), rel=HEADERS)
