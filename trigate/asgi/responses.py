"""Response calls: what the gateway adds to one before its exchange."""

from __future__ import annotations

import secrets
import time

import attrs

from trigate.openai.request import Call, Identity


def identified(call: Call) -> Call:
    """Returns a call whose answer has an id and a time of the gateway's own, in case the gateway makes the answer."""
    return attrs.evolve(call, identity=Identity(id=f"resp_{secrets.token_hex(24)}", created_at=int(time.time())))
