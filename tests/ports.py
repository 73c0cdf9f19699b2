"""Reserves ports for the servers of a test, so that no other process takes a port before the server does."""

import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

HIGHEST = 65_535
"""The highest port number."""


@contextmanager
def held_ports(count: int, offsets: Sequence[int] = (0,)) -> Iterator[list[int]]:
    """Yield `count` ports of 127.0.0.1 that stay reserved during the block.

    `offsets`: for each port, the ports at these distances above it are reserved as well, for servers that derive a
    second port in this way.

    Each port is bound by a socket of this process that does not listen. The kernel gives such a port to no process that
    asks for any free port, and it refuses connections to the port, so the port also serves as an address where nobody
    answers. A server that sets SO_REUSEADDR (those of gRPC, Go, asyncio and Python's http.server do) can still take the
    port by its number, even several times.
    """
    with ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            with ExitStack() as group:
                port = _bind(group, 0)
                try:
                    for offset in offsets:
                        if offset:
                            _bind(group, port + offset)
                except (OSError, OverflowError):  # a port is taken or above HIGHEST: try another one
                    continue
                ports.append(port)
                stack.push(group.pop_all())
        if sys.platform != "linux":  # elsewhere a server cannot share the port, so it has to be released
            stack.pop_all().close()
        yield ports


def _bind(stack: ExitStack, port: int) -> int:
    """Bind the given port, or any free port if it is 0, until the stack is closed, and return its number.

    Raises OSError if the port is taken, OverflowError if it is above HIGHEST.
    """
    if port > HIGHEST:
        raise OverflowError(f"there is no port {port}")
    held = stack.enter_context(socket.socket())
    held.bind(("127.0.0.1", port))
    # Set after bind: with the option set before, bind would also succeed on a port that another test holds.
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    number: int = held.getsockname()[1]
    return number
