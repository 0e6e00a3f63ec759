"""Lets go of the frames that a kept exception refers to. Pure."""

from __future__ import annotations


def drop_frames(error: BaseException) -> None:
    """Drops the tracebacks of an error and of everything that it is chained to or consists of.

    A frame that keeps an error is a part of the error's traceback: a reference cycle, with every buffer in those
    frames, that lasts until the garbage collector runs. So code that catches an error and keeps it calls this.
    """
    chain: list[BaseException | None] = [error]
    while chain:
        each = chain.pop()
        if each is not None:
            chain += (each.__cause__, each.__context__, *getattr(each, "exceptions", ()))
            each.__traceback__ = each.__cause__ = each.__context__ = None
