"""The status of the gateway: ``GET /status``, the exchanges in flight, and the lines at start-up.

`schema` defines the bodies, for the server and for the command line; read it first. `reporter` makes the status of all
workers: `snapshot` defines the part of one worker, and `merge` merges the parts. `inflight` lists and cancels exchanges
on all workers. `startup` has the lines. The package knows nothing of HTTP: `trigate.asgi.routes.status` serves it.

Import from the modules. The command line imports `schema`, which must not load the services that the others report on.
"""
