"""What a target needs to continue a stream that another one began.

Only plain text can be continued: the text that has been sent becomes the beginning of an assistant's message, which the
next target completes. A partial tool call or partial reasoning cannot be continued.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import msgspec

from trigate.exchange.request import ExchangeRequest
from trigate.exchange.translation import Reader
from trigate.openai.accumulator import AnswerAccumulator
from trigate.openai.continuation import continuation_head


@attrs.frozen
class Continuation:
    """The state of a stream that targets have begun.

    Attributes:
        text: The assistant's text so far.
        head: The fields that all events of the stream have in common.
        events: How many events have been sent.
    """

    text: str = ""
    head: Mapping[str, msgspec.Raw] | None = None
    events: int = 0

    def after(self, reader: Reader) -> Continuation | None:
        """Returns the state after a stream that broke off; None = it cannot be continued.

        Args:
            reader: Has kept what it returned of that stream.
        """
        kept = reader.kept
        if kept is None or reader.all_finished:
            return None
        answer = AnswerAccumulator()
        for frames in kept:
            answer.feed(frames)
        if not (answer.is_only_text and answer.is_exact):
            return None
        return Continuation(self.text + answer.text, self.head or continuation_head(kept), self.events + reader.events)


NEW_STREAM = Continuation()


def may_be_continued(request: ExchangeRequest) -> bool:
    """Whether another target may continue a stream that breaks off, so that its events have to be kept."""
    return request.model.on_truncation == "continue" and request.call.endpoint.path == "/chat/completions"
