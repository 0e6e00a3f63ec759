"""Ending the requests of clients that have left: all of them, in their order, and others in between."""

from __future__ import annotations

import trio
import trio.testing

from trigate.leaving import SLICE, open_leaving


async def test_all_are_cancelled_and_others_have_their_turn() -> None:
    """A thousand at once are cancelled in the order in which they left, and everybody else has turns in between."""
    ended: list[int] = []
    most_between_turns = 0

    async def request(number: int, scope: trio.CancelScope) -> None:
        with scope:
            await trio.sleep_forever()
        ended.append(number)

    scopes = [trio.CancelScope() for _ in range(1000)]
    async with open_leaving() as leaving, trio.open_nursery() as nursery:
        for number, scope in enumerate(scopes):
            nursery.start_soon(request, number, scope)
        await trio.testing.wait_all_tasks_blocked()
        for scope in scopes:
            leaving.cancel_soon(scope)
        while len(ended) < len(scopes):
            before = len(ended)
            await trio.lowlevel.checkpoint()
            most_between_turns = max(most_between_turns, len(ended) - before)
    assert sorted(ended) == list(range(1000))
    assert all(abs(place - number) < 2 * SLICE for place, number in enumerate(ended))
    assert 0 < most_between_turns <= 2 * SLICE  # one slice is in the making while another one ends


async def test_it_waits_for_the_next_one() -> None:
    """Between two clients that leave it sleeps; a scope that has ended does no harm."""
    async with open_leaving() as leaving:
        with trio.CancelScope() as over:
            await trio.lowlevel.checkpoint()
        leaving.cancel_soon(over)
        for _ in range(3):
            with trio.CancelScope() as scope:
                leaving.cancel_soon(scope)
                await trio.sleep_forever()
            assert scope.cancelled_caught
