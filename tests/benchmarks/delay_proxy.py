"""Runs a proxy in front of a server that delays every answer, as a network to a distant store does.

Only the latency changes, not the number of bytes per second: while one answer is under way, others may follow it. The
proxy does not read what it passes on, and it has a process of its own, so it takes no time from the process that is
measured.
"""

import asyncio
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

CHUNK_BYTES = 1 << 16


@contextmanager
def delay_proxy(upstream: str, seconds: float) -> Iterator[str]:
    """Yield the URL of a running proxy in front of the server with this URL. `seconds`: the delay of each answer."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(
        target=_serve, args=(urlsplit(upstream).hostname, urlsplit(upstream).port, seconds, there)
    )
    process.start()
    there.close()  # if the process fails, `recv` then ends
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.kill()  # it keeps nothing, so there is no need for a clean end
        process.join()


def _serve(host: str, port: int, seconds: float, parent: Connection) -> None:
    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, requests = await asyncio.open_connection(host, port)
        await asyncio.gather(_pass_on(reader, requests, 0.0), _pass_on(answers, writer, seconds))

    async def serve() -> None:
        server = await asyncio.start_server(meet, "127.0.0.1", 0, backlog=1024)
        parent.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


async def _pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter, seconds: float) -> None:
    """Write whatever comes from the source to the target, each piece `seconds` after it came, up to the end."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def write(data: bytes) -> None:
        if data and not target.is_closing():
            target.write(data)
        else:
            target.close()
            done.set()

    data = b" "
    while data:
        try:
            data = await source.read(CHUNK_BYTES)
        except ConnectionError:
            data = b""
        if seconds:
            loop.call_later(seconds, write, data)
        else:
            write(data)
    await done.wait()
