"""Channels: where messages come in and replies go out. Supervised: what is wrong with one is that one's alone."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Literal

import attrs

if TYPE_CHECKING:
    from trigate.gateway import Gateway

ChannelState = Literal["connected", "connecting", "disconnected", "disabled"]


@attrs.frozen(kw_only=True)
class ChannelStatistics:
    """How a channel is, in this worker.

    Attributes:
        state: ``connected`` = the last exchange with its platform succeeded (a webhook: it is ready to be called).
        since: POSIX seconds of the last change of the state.
    """

    name: str
    type: Literal["webhook", "telegram", "slack"]
    state: ChannelState
    since: float
    last_error: str | None = None


class Channels:
    """The channels of the current configuration. Made by `open_channels`."""

    def apply(self) -> None:
        """The configuration has changed: starts, stops and changes what has to be. Synchronous."""
        raise NotImplementedError

    def statistics(self) -> Sequence[ChannelStatistics]:
        """All channels, hooks included, in the order of the configuration."""
        raise NotImplementedError


@contextlib.asynccontextmanager
async def open_channels(gateway: Gateway) -> AsyncIterator[Channels]:
    """Opens the channels, each in a nursery of its own."""
    raise NotImplementedError
    yield
