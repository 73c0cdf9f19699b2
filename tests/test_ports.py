"""Tests that nobody answers at a held port, that a server can take it, and that no other process gets it."""

import errno
import socket
import sys

import pytest

from tests.ports import held_ports

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(sys.platform != "linux", reason="a bound port can be shared with a server on Linux"),
]


def test_nobody_answers_at_a_held_port() -> None:
    with held_ports(1) as [port], pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=60)


def test_a_server_takes_a_held_port_again_and_again() -> None:
    with held_ports(1) as [port]:
        for _ in range(3):
            with socket.create_server(("127.0.0.1", port)) as server:
                client = socket.create_connection(("127.0.0.1", port), timeout=60)
                accepted, _address = server.accept()
                client.close()
                accepted.close()


def test_what_is_held_is_held_once() -> None:
    """Ports held at the same time differ, including those at an offset. A socket without SO_REUSEADDR cannot be
    bound to one."""
    with held_ports(5, (0, 10_000)) as ours, held_ports(50) as others:
        taken = {*ours, *(port + 10_000 for port in ours)}
        assert len(taken) == 10
        assert not taken & set(others)
        for port in taken:
            with socket.socket() as probe, pytest.raises(OSError, match="in use") as raised:
                probe.bind(("127.0.0.1", port))
            assert raised.value.errno == errno.EADDRINUSE
