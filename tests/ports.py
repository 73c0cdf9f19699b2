"""Ports that cannot be lost between the moment when a test chooses them and the moment when a server takes them."""

import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

HIGHEST = 65_535


@contextmanager
def held_ports(count: int, offsets: Sequence[int] = (0,)) -> Iterator[list[int]]:
    """So many ports of 127.0.0.1, held for as long as the block runs. `offsets`: so far above each port there is
    another one that is held as well, for servers that take a second port by such a rule.

    Each has a socket of this process, bound and not listening. The kernel gives such a port to nobody who asks for any
    port, and refuses connections to it: that is all a test needs which wants an address where nobody answers. A server
    that sets SO_REUSEADDR, as those of gRPC, Go, asyncio and Python's http.server do, can be told the number and takes
    the port all the same, once or several times.
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
                except (OSError, OverflowError):  # it is taken, or beyond the last port: try another one
                    continue
                ports.append(port)
                stack.push(group.pop_all())
        if sys.platform != "linux":  # elsewhere a server cannot share the port, so all that is left is to let it go
            stack.pop_all().close()
        yield ports


def _bind(stack: ExitStack, port: int) -> int:
    """The number of a port that is ours, which is the one asked for where it is not 0."""
    if port > HIGHEST:
        raise OverflowError(f"there is no port {port}")
    held = stack.enter_context(socket.socket())
    held.bind(("127.0.0.1", port))
    # Only now: bound with it, the socket would share the port of another test that holds it in the same way.
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    number: int = held.getsockname()[1]
    return number
