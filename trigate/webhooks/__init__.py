"""Webhooks: ``POST /hooks/NAME``, and the callbacks that deliver results.

Knows runs, channels (as adapters) and signatures. Must not know the ASGI application or the gateway: the application
passes the head of a request to `Hooks.check_head`, reads the body and passes it to the returned `HookCall`.

Read `endpoint` first: the ordered checks of a request. Then `calls` (what happens with its body), `payload` (the
meaning of a body; pure) and `callbacks` (signed POSTs of results).
"""

from trigate.webhooks.callbacks import Callbacks, open_callbacks
from trigate.webhooks.calls import HookCall, HookHead
from trigate.webhooks.endpoint import Hooks

__all__ = ["Callbacks", "HookCall", "HookHead", "Hooks", "open_callbacks"]
