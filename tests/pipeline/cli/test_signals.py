"""Tests of stop signals: which of them stop a job, and which end it at once."""

import signal
from collections.abc import Iterator

import pytest

from pipeline.cli.signals import StopSignals


@pytest.fixture(params=[signal.SIG_DFL, signal.SIG_IGN], ids=["default", "ignored"])
def on_entry(request: pytest.FixtureRequest) -> Iterator[object]:
    """Set what SIGHUP does before the command begins, and give back what it did."""
    before = signal.signal(signal.SIGHUP, request.param)
    yield request.param
    assert signal.getsignal(signal.SIGHUP) is request.param  # the command has given it back
    signal.signal(signal.SIGHUP, before)


def test_sighup_stops_unless_it_is_ignored(on_entry: object) -> None:
    with StopSignals() as signals:
        signals.install()
        signals.install()
        if on_entry is signal.SIG_IGN:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        else:
            signal.raise_signal(signal.SIGHUP)
            assert signals.stop.is_set()
            assert signals.received == signal.SIGHUP
        signal.raise_signal(signal.SIGTERM)
        assert signals.stop.is_set()


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_sighup_is_never_the_second_signal(first: signal.Signals) -> None:
    """systemd sends SIGTERM and SIGHUP together. Only a second SIGINT or SIGTERM means: at once."""
    with StopSignals() as signals:
        signals.install()
        for number in (first, signal.SIGHUP, signal.SIGHUP):
            signal.raise_signal(number)
        assert signals.received == first
        if first == signal.SIGHUP:
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signals.received == first
