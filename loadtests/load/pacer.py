"""A server that computes nothing: it sends the events of /generate at a steady pace and writes down
when it sent each. What a client sees later than that is the client's own doing.

    python -m loadtests.load.pacer --port 8300 --interval-ms 20

GET /sent gives the moments (CLOCK_MONOTONIC, ns, which all processes of a machine share) by
request id, and forgets them; GET /cpu the processor seconds of this process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from contextlib import suppress

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
    b"x-request-id: %b\r\nconnection: close\r\n\r\n"
)
INFO = {"model": "pacer", "context_length": 1 << 20, "vocab_size": 1000, "device": "none"}


class Pacer:
    """One token a stream every `interval_s`."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._sent: dict[str, list[int]] = {}
        self._served = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request a connection."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            path = head.split(" ", 2)[1]
            fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
            body = await reader.readexactly(int(fields.get("content-length", 0)))
            if path == "/generate":
                await self._stream(json.loads(body), writer)
            else:
                await _answer(writer, self._facts(path))
        writer.close()

    def _facts(self, path: str) -> object:
        if path == "/sent":
            sent, self._sent = self._sent, {}
            return sent
        return {"seconds": time.process_time()} if path == "/cpu" else INFO

    async def _stream(self, body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        self._served += 1
        name = f"paced-{self._served}"
        sent = self._sent[name] = []
        prompt, count = body["prompt"], int(str(body["max_tokens"]))
        start = {"id": name, "model": "pacer", "prompt_tokens": len(prompt), "seed": 0}  # type: ignore[arg-type]
        writer.write(HEAD % name.encode() + _event(f"{name}:0", "start", start))
        number, due = 0, time.monotonic()
        for number in range(1, count + 1):
            due += self._interval_s
            await asyncio.sleep(due - time.monotonic())
            if writer.transport.is_closing():  # the reader is gone
                return
            token = {"index": 0, "text": " tick", "token_ids": [number % 1000]}
            sent.append(time.monotonic_ns())
            writer.write(_event(f"{name}:{number}", "token", token))
        done = {
            "index": 0,
            "finish_reason": "length",
            "text": " tick" * count,
            "usage": {
                "prompt_tokens": start["prompt_tokens"],
                "cached_prompt_tokens": 0,
                "completion_tokens": count,
            },
            "timing": {},
        }
        writer.write(_event(f"{name}:{number + 1}", "done", done) + b"0\r\n\r\n")
        await writer.drain()


def _event(event_id: str, event: str, data: dict[str, object]) -> bytes:
    """One event in one chunk."""
    text = f"id: {event_id}\nevent: {event}\ndata: {json.dumps(data)}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(text), text)


async def _answer(writer: asyncio.StreamWriter, facts: object) -> None:
    body = json.dumps(facts).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    writer.write(head.encode() + b"connection: close\r\n\r\n" + body)
    await writer.drain()


async def _main(port: int, interval_s: float) -> None:
    pacer = Pacer(interval_s)
    server = await asyncio.start_server(pacer.serve, "127.0.0.1", port, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--interval-ms", type=float, default=20.0)
    given = parser.parse_args()
    with suppress(KeyboardInterrupt):
        asyncio.run(_main(given.port, given.interval_ms / 1e3))
