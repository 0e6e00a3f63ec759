"""A relay in about thirty lines of aiohttp: the plain, fast baseline. ``python aiohttp_relay.py PORT UPSTREAM``."""

from __future__ import annotations

import sys

import aiohttp
from aiohttp import web

port, upstream = int(sys.argv[1]), sys.argv[2]
session_key: web.AppKey[aiohttp.ClientSession] = web.AppKey("session", aiohttp.ClientSession)


async def relay(request: web.Request) -> web.StreamResponse:
    """Sends a call on, and its answer back, a chunk at a time."""
    body = await request.read()
    headers = {"content-type": "application/json"}
    async with request.app[session_key].post(upstream + request.path, data=body, headers=headers) as answer:
        if answer.content_type != "text/event-stream":
            return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)
        response = web.StreamResponse(status=answer.status, headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        async for data in answer.content.iter_any():
            await response.write(data)
        await response.write_eof()
        return response


async def connect(app: web.Application) -> None:  # noqa: ASYNC124 - aiohttp awaits it, a session needs a loop
    """Makes the pool of connections to the upstream: as many as there are calls, for as long as they take."""
    connector = aiohttp.TCPConnector(limit=0)
    app[session_key] = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


async def disconnect(app: web.Application) -> None:
    """Closes it."""
    await app[session_key].close()


app = web.Application(client_max_size=16 << 20)
app.on_startup.append(connect)
app.on_cleanup.append(disconnect)
app.router.add_post("/v1/chat/completions", relay)
web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None, backlog=2048)
