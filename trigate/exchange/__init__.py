"""One call, end to end: admission, the upstream call, the client's answer, and one record of how it ended.

It uses upstreams, the ledger and OpenAI's format, and must not use Quart, webhooks, runs or the gateway. Read
`exchange` first: one request on one page. Then read its two sides, which a `sink` joins: the client's side
(`client_sink`, `client_response`) and the upstream's side (`upstream_call`, `attempt`, `answers`). `translation` is the
place for other formats than OpenAI's. `shared_call` shares one upstream call between equal calls (`call_key`),
`socket_relay` is the fast path, `deadlines` and `watchdog` apply the time limits, `admission` admits, queues or refuses
exchanges, and `view` makes what ``/status`` and the log show.

Checkpoints: an async function of this package need not be a checkpoint (flake8-async's ASYNC910 is off here). A send
that the kernel accepts at once is not one, and neither is the receipt of a piece that has already arrived.
`server.client_stream` and `concurrency.poller` bound how long a task can run like that.
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
