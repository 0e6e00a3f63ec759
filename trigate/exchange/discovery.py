"""Finds out whether an upstream serves the Responses API (``responses = "discover"``).

The first call goes to it as it is. If the upstream has no such endpoint, the call is translated, before anything of an
answer has been sent, and so is every later one.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager

import msgspec

from trigate.config.sections import UpstreamConfig
from trigate.dialects.endpoints import RESPONSES
from trigate.dialects.translated_call import TranslatedCall
from trigate.errors import GatewayError, Rejected
from trigate.exchange.translation import Reader, Translation, translation_of
from trigate.openai.answer import Usage
from trigate.openai.request import Call
from trigate.upstream.reply import Reply
from trigate.upstream.upstream import Upstream

_ABSENT = (404, 405, 501)
"""The statuses by which an upstream says that it has no such endpoint."""


def translation_for(call: Call, upstream: Upstream, model: str) -> Translation:
    """Chooses the translation of a call for an upstream. Raises as `translation_of`."""
    translation = translation_of(call, upstream.name, upstream.config, upstream.responses, model)
    if upstream.responses == "discover" and call.endpoint is RESPONSES:
        return Discovering(call, upstream, model, translation)
    return translation


class Discovering:
    """A `Translation` of one call: none, until the upstream has said that it has no such endpoint."""

    def __init__(self, call: Call, upstream: Upstream, model: str, native: Translation) -> None:
        self._call = call
        self._upstream = upstream
        self._model = model
        self._chosen = native

    @contextlib.asynccontextmanager
    async def open(self, opening: Callable[[Translation], AbstractAsyncContextManager[Reply]]) -> AsyncIterator[Reply]:
        """Opens the reply to the call as it is, or else to the translated call.

        Args:
            opening: Sends the call in a translation.

        Raises:
            GatewayError: As `Upstream.open`; or the upstream refused the call, or the call cannot be translated.
        """
        upstream = self._upstream
        async with opening(self._chosen) as reply:
            if reply.status not in _ABSENT:
                if 200 <= reply.status < 300:
                    upstream.responses = "native"
                yield reply
                return
            error = await upstream.error_of(reply)
        if not _is_of_endpoint(error, upstream.name):
            raise error
        upstream.responses = "translate"
        self._chosen = translation_of(self._call, upstream.name, upstream.config, upstream.responses)
        if isinstance(self._chosen, TranslatedCall):
            self._chosen.limit_answer(upstream.max_output_tokens(self._model))
        async with opening(self._chosen) as reply:
            yield reply

    # -- as the chosen translation ------------------------------------------------------------------------------------

    @property
    def dropped(self) -> tuple[str, ...]:
        return self._chosen.dropped

    @property
    def stream_types(self) -> tuple[str, ...]:
        return self._chosen.stream_types

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        return self._chosen.headers(headers)

    def path(self, call: Call, model: str) -> str:
        return self._chosen.path(call, model)

    def body(self, call: Call, model: str, upstream: UpstreamConfig) -> bytes:
        return self._chosen.body(call, model, upstream)

    def stream_reader(
        self,
        call: Call,
        *,
        upstream: str,
        max_event_bytes: int,
        keep_bytes: int,
        continues: Mapping[str, msgspec.Raw] | None,
    ) -> Reader:
        return self._chosen.stream_reader(
            call, upstream=upstream, max_event_bytes=max_event_bytes, keep_bytes=keep_bytes, continues=continues
        )

    def events(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        return self._chosen.events(call, body, upstream=upstream)

    def collected(self, call: Call, body: bytes, *, upstream: str) -> bytes:
        return self._chosen.collected(call, body, upstream=upstream)

    def answer(self, call: Call, body: bytes, *, upstream: str) -> tuple[bytes, Usage | None]:
        return self._chosen.answer(call, body, upstream=upstream)


def _is_of_endpoint(error: GatewayError, upstream: str) -> bool:
    """Whether a refusal means that the endpoint does not exist, and not the model."""
    if not isinstance(error, Rejected):
        return False
    return error.status != 404 or "model" not in error.message.removeprefix(f"The upstream {upstream} ").lower()
