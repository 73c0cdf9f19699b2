"""Tests of the watch over a cluster: a process that no longer listens is named, after some patience."""

import pytest

from tests.ports import held_ports
from tests.waiting import wait_until
from workers.cluster.watch import PATIENCE, SHARE, ClusterWatch, patience_s

pytestmark = pytest.mark.server


def test_a_process_that_does_not_answer_is_lost() -> None:
    with held_ports(1) as [port]:  # nothing listens there
        watch = ClusterWatch({"the head": ("127.0.0.1", port)}, lambda: True, 0.05)
        wait_until(lambda: watch.lost)
    assert watch.lost is not None
    assert watch.lost.startswith(f"the head at 127.0.0.1:{port} has not answered for ")


def test_the_patience_is_shorter_than_that_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PATIENCE, raising=False)
    assert patience_s() == SHARE * 60
    monkeypatch.setenv(PATIENCE, "300")
    assert patience_s() == SHARE * 300
    monkeypatch.setenv(PATIENCE, "long")
    assert patience_s() == SHARE * 60
