"""The ASGI application: from an HTTP request to an exchange, a webhook or a page of the control plane.

It uses the gateway's services, and must not contain how a call is served or how a connection is kept. (It is not called
``app``: importing a submodule of that name would replace ``trigate:app``.) Read `dispatch` first: one request. `auth`
is access control, `request` and `request_body` are the head and the body of a request, `data_plane` starts exchanges,
`health` answers probes, `control_plane` is the Quart application with the views in `routes`, and `application`
assembles everything.

Checkpoints: an async function of this package need not be a checkpoint (flake8-async's ASYNC910 is off here), for the
reason that `trigate.exchange` gives.
"""

from trigate.asgi.application import GatewayApp, create_app, tune_memory

__all__ = ["GatewayApp", "create_app", "tune_memory"]
