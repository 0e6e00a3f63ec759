"""An HTTP/1.1 and HTTP/2 server for any ASGI application that runs on Trio.

It knows nothing of models, and imports only `trigate.concurrency`, `trigate.config` and `trigate.errors`. Read
`server` first (the accept loop), then `shutdown`; `http1` is one connection, and `supervisor` runs several processes.
There are no public names here, as they would load hypercorn and h2 into every process that needs one module.

**Checkpoints.** An ``async def`` in this package need not be a checkpoint (flake8-async's ASYNC910 is off here): there
is no checkpoint where the kernel took or had the bytes at once, as a checkpoint costs as much as the system call. What
bounds a task that never waits: `client_stream.ClientStream` counts the bytes that came and went without a wait, and
yields after `client_stream.YIELD_AFTER_BYTES`; `http1` yields between two pipelined requests. Cancellation is checked
at the beginning of each send.
"""
