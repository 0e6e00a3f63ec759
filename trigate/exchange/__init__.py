"""One call, end to end: admission, the upstream call, the client's answer, and one record of how it ended.

It knows upstreams, the ledger and OpenAI's format, and must not know Quart, webhooks, runs or the gateway. Read
`exchange` first: one request on one page. Then the two halves that a `sink` joins: `client_sink` over
`client_response`, and `upstream_call` with `attempt` and `answers`. `translation` is where other formats than OpenAI's
will go. `shared_call` shares an upstream call between equal calls, `socket_relay` is the fast path, `deadlines` and
`watchdog` keep the limits in time, `admission` decides who is served, and `view` is what ``/status`` and the log show.

Checkpoints: a function of this package need not be one (flake8-async's ASYNC910 is off here). A send to a client that
takes the bytes at once is none, nor is a piece that the upstream had sent already; `server.client_stream` and
`concurrency.poller` bound how long a task can go on like that.
"""

from trigate.exchange.client_response import ClientResponse
from trigate.exchange.exchange import Exchange, ExchangeServices
from trigate.exchange.live import LiveExchanges
from trigate.exchange.outcome import Outcome, Phase
from trigate.exchange.request import ExchangeRequest
from trigate.exchange.sink import Recorder, Sink

__all__ = [
    "ClientResponse",
    "Exchange",
    "ExchangeRequest",
    "ExchangeServices",
    "LiveExchanges",
    "Outcome",
    "Phase",
    "Recorder",
    "Sink",
]
