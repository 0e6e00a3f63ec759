"""The models that an upstream lists: decodes ``GET /models``, and polls it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import trio

from trigate.errors import GatewayError, ProtocolViolation, Rejected
from trigate.logs import log
from trigate.upstream.upstream import Upstream

MAX_MODEL_LIST_BYTES = 16 * 1024 * 1024

REFRESH_S = 60.0
"""How often an upstream is asked for its models."""

RETRY_S = 5.0
"""Half the pause after a failure at the start. The pause doubles with each further failure, up to `REFRESH_S`."""

_TIMEOUT_S = 10.0


class _ModelItem(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_ModelItem]


_decoder = msgspec.json.Decoder(_ModelList)


def decode_model_list(body: bytes) -> tuple[str, ...]:
    """Returns the ids in an answer to ``GET /models``, in their order, each once.

    Raises:
        ValueError: The body is not a model list.
    """
    try:
        return tuple(dict.fromkeys(item.id for item in _decoder.decode(body).data))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class ModelPoll:
    """Keeps the list of models of an upstream up to date, and with it the upstream's state.

    While the upstream does not answer, its last list stays in use.

    Args:
        on_change: Called after each list that was received. Synchronous.

    Attributes:
        tried: Set after the first request to the upstream, whether it succeeded or not.
    """

    def __init__(self, upstream: Upstream, on_change: Callable[[], None]) -> None:
        self._upstream = upstream
        self._on_change = on_change
        self.tried = trio.Event()
        upstream.polled = True

    def __repr__(self) -> str:
        return f"<ModelPoll of {self._upstream.name}>"

    async def run(self) -> None:
        """Asks the upstream again and again, until it is cancelled."""
        upstream = self._upstream
        pause_s = RETRY_S
        while True:
            try:
                await self._ask()
                upstream.note_up()
                pause_s = REFRESH_S
            except GatewayError as error:
                if isinstance(error, Rejected) and error.status not in (401, 403):
                    upstream.note_up()  # the upstream answers, but has no list, or none for this gateway
                elif error.blame == "gateway":
                    log.warning("models_not_listed", upstream=upstream.name, error=error.message)
                elif upstream.state != "down" or upstream.reason != error.message:
                    log.warning("models_not_listed", upstream=upstream.name, error=error.message)
                    upstream.note_down(error)
                pause_s = min(pause_s * 2, REFRESH_S)
            except Exception:  # a defect in the poll of one upstream must not stop the others
                log.exception("models_refresh_crashed", upstream=upstream.name)
                pause_s = REFRESH_S
            self.tried.set()
            await trio.sleep(pause_s)

    async def _ask(self) -> None:
        upstream = self._upstream
        with trio.move_on_after(_TIMEOUT_S):
            async with upstream.open("GET", "/models") as reply:
                if reply.status != 200:
                    raise await upstream.error_of(reply)
                body = await reply.read(MAX_MODEL_LIST_BYTES)
            try:
                upstream.models = decode_model_list(body)
            except ValueError as error:
                raise ProtocolViolation(f"GET /models of {upstream.name} gave no model list: {error}.") from None
            self._on_change()
            return
        raise ProtocolViolation(f"GET /models of {upstream.name} was not answered within {_TIMEOUT_S:g} s.")
