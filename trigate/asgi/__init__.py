"""The ASGI application: from an HTTP request to an exchange, a webhook or a page of the control plane.

It uses the gateway's services, and must not contain how a call is served or how a connection is kept. (It is not called
``app``: importing a submodule of that name would replace ``trigate:app``.) Read `dispatch` first: one request. `auth`
is access control, `request` and `request_body` are the head and the body of a request, `data_plane` starts exchanges,
`routes` are the views of the control plane, and `application` assembles the application.

Checkpoints: an async function of this package need not be a checkpoint (flake8-async's ASYNC910 is off here), for the
reason that `trigate.exchange` gives.
"""

from trigate.asgi.application import calm_collector, create_app
from trigate.asgi.quart_app import GatewayApp

__all__ = ["GatewayApp", "calm_collector", "create_app"]
