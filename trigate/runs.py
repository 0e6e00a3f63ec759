"""Runs: what was asked for by messages of hooks and channels, from its acceptance to its result.

A run is a row in the store with a life of its own, and an exchange like any other while it is performed: in its own
nursery, with an in-process client, or in that of the webhook call that waits for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from trigate.config import Action
from trigate.store import Claim, Run

if TYPE_CHECKING:
    from trigate.exchange import Downstream
    from trigate.gateway import Gateway


@attrs.frozen(kw_only=True)
class Order:
    """What a message asks for; everything that is needed to do it, also after a restart with another configuration.
    Kept as JSON in `store.Run.request`.

    Attributes:
        channel: The hook or channel that it came by.
        owner, session: Whose session it belongs to, and its key; session None = nothing is remembered.
        text: The prompt (``chat``) or the note (``note``).
        sender: Who sent it.
        reply_to: Where the result goes: a callback's URL, or what the channel's adapter needs to reply; None = it is
            fetched.
        finish: It goes on where the client that waits for it leaves.
    """

    channel: str
    owner: str
    session: str | None
    action: Action
    text: str
    sender: str
    model: str
    system: str | None = None
    parameters: Mapping[str, Any] = attrs.field(factory=dict)  # Any: JSON
    reply_to: Mapping[str, Any] | str | None = None
    finish: bool = False


class Live(Protocol):
    """A reply that can be watched while it grows: what a channel shows of a run that goes on."""

    def show(self, text: str) -> None:
        """The text so far. Synchronous, and called often: whoever shows it takes the last one when it can."""

    async def end(self) -> Mapping[str, Any]:
        """Stops showing. Returns what the delivery of the final text has to know (the id of the message to edit)."""


class Audience(Protocol):
    """A channel that shows runs while they go on; what it is told at the end is a delivery (`outbox.Carrier`)."""

    def watch(self, run: Run, order: Order) -> contextlib.AbstractAsyncContextManager[Live]:
        """Shows a run for as long as the context is open."""


class Runs:
    """The runs of this worker. Made by `open_runs`."""

    audiences: dict[str, Audience]
    """By the name of the channel; may change at any time."""

    async def accept(self, order: Order, *, acknowledged: bool, idempotency: tuple[str, bytes] | None = None) -> Claim:
        """Keeps an order as a run, durably.

        Args:
            acknowledged: It is promised to be finished.
            idempotency: A key, and a digest of the body; unique in the channel.

        Raises:
            StoreUnavailable: It could not be kept.
        """
        raise NotImplementedError

    async def perform(self, run: Run, *, down: Downstream | None = None) -> Run:
        """Does a run in the caller's task, and returns it with its result. Cancelled with the caller, it ends as
        ``cancelled`` with what there was of the answer.

        Args:
            down: The client that the answer is streamed to, as chunks of OpenAI's; None = nobody watches.
        """
        raise NotImplementedError

    def perform_soon(self, run: Run) -> None:
        """Does a run in the nursery of the service. Synchronous."""
        raise NotImplementedError

    async def wait_ended(self, run_id: str) -> Run:
        """Waits until a run has ended, in whichever worker it is performed."""
        raise NotImplementedError

    async def stop(self, owner: str, session: str) -> Sequence[Run]:
        """Stops the running turn of a session, and returns the runs that were cut, ended, with what there is of their
        answers in their results."""
        raise NotImplementedError


@contextlib.asynccontextmanager
async def open_runs(gateway: Gateway) -> AsyncIterator[Runs]:
    """Opens the service; what other workers left is adopted at `workers.join`."""
    raise NotImplementedError
    yield
