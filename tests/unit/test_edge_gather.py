"""When a step of an edge or a cloud waits for more tokens."""

from __future__ import annotations

from vllm_effplugin.techniques.edge_cloud.gather import CloudGather, EdgeGather


def test_an_edge_waits_for_a_third_of_its_requests_and_not_for_ever() -> None:
    gather = EdgeGather(0.05)
    assert not gather.holds(0, 8, 0.0)  # nobody could go on
    assert not gather.holds(1, 0, 0.0)  # nobody else is under way
    assert not gather.holds(3, 5, 0.0)
    assert gather.holds(2, 6, 1.0)
    assert gather.holds(2, 6, 1.04)
    assert not gather.holds(3, 5, 1.045)
    # From then on anew, and no longer than it may take.
    assert gather.holds(1, 7, 1.05)
    assert gather.holds(2, 6, 1.09)
    assert not gather.holds(2, 6, 1.101)
    assert gather.holds(2, 6, 1.102)


def test_a_cloud_waits_while_questions_keep_coming() -> None:
    gather = CloudGather(0.002)
    assert not gather.holds(0.0)
    gather.arrived(1.0)
    assert gather.holds(1.001)
    gather.arrived(1.0015)
    assert gather.holds(1.003)
    assert not gather.holds(1.0036)
    assert not gather.holds(1.0037)  # until the next one
    for step in range(20):
        gather.arrived(2 + step / 1000)
    assert not gather.holds(2.0195)  # too many for one step to wait for


def test_nobody_waits_where_it_is_off() -> None:
    edge, cloud = EdgeGather(0.0), CloudGather(0.0)
    assert not edge.holds(1, 7, 0.0)
    cloud.arrived(0.0)
    assert not cloud.holds(0.0)
