"""An answer of a chat model, put together from its events. Pure."""

from __future__ import annotations


class AnswerRecord:
    """The first choice of a chat answer, as it comes.

    Attributes:
        text: Its content so far.
        finish_reason: None until it has come.
        has_tool_calls: It has asked for tools.
    """

    text: str
    finish_reason: str | None
    has_tool_calls: bool

    def hear(self, frames: bytes) -> None:
        """Takes whole server-sent events (`exchange.Recorder.hear`)."""
        raise NotImplementedError

    def hear_answer(self, body: bytes) -> None:
        """Takes a whole JSON answer (`exchange.Recorder.hear_answer`)."""
        raise NotImplementedError

    @property
    def has_content(self) -> bool:
        """There is something to keep: text, a refusal, or tool calls."""
        raise NotImplementedError

    def message(self) -> bytes:
        """The assistant message so far, as JSON; of one that was cut, tool calls are left out."""
        raise NotImplementedError
