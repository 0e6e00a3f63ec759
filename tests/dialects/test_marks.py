"""`trigate.dialects.marks`, and what becomes of a mark on the way in."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from tests.dialects.chat import MARKS, answer_of, call, chunk, mark_of, message_of, translate, usage
from trigate.config.sections import UpstreamConfig, Url
from trigate.dialects.anthropic import MessagesClient, without_own_reasoning
from trigate.dialects.marks import PREFIX, Marks, is_mark
from trigate.dialects.openai_chat import ChatUpstream
from trigate.dialects.translated_call import Memory, TranslatedCall

LOCAL = UpstreamConfig(base_url=Url("http://127.0.0.1:8000/v1"))


def sent_with(signature: str, *, text: str = "hm") -> tuple[dict[str, object], tuple[str, ...]]:
    """The second message that an upstream gets of a conversation with a thinking block, and what was dropped."""
    block = {"type": "thinking", "thinking": text, "signature": signature}
    turn = {"role": "assistant", "content": [block, {"type": "text", "text": "a"}]}
    turns = [{"role": "user", "content": "q"}, turn, {"role": "user", "content": "r"}]
    asked = call(messages=turns, thinking=None)
    made = TranslatedCall(asked, MessagesClient(), ChatUpstream(), has_marks=True)
    made.use(Memory(marks=MARKS))
    body = msgspec.json.decode(made.body(asked, "m", LOCAL))
    return body["messages"][1], made.dropped


def test_a_mark_that_fits() -> None:
    """The reasoning goes to a provider that takes it back."""
    message, dropped = sent_with(mark_of("hm"))
    assert (message["reasoning_content"], dropped) == ("hm", ())


def test_a_mark_that_does_not_fit() -> None:
    """That of another text, of another gateway, of an earlier version or made up: the block is dropped, by name."""
    forged = (mark_of("other"), Marks(b"k" * 32).mark_of("hm"), f"{PREFIX}1.0123", PREFIX, f"{PREFIX}2.\udcff"[:-1])
    for signature in forged:
        message, dropped = sent_with(signature)
        assert "reasoning_content" not in message, signature
        assert dropped == ("thinking",)


def test_a_message_of_nothing_else() -> None:
    """It is left out with its block."""
    turn = {"role": "assistant", "content": [{"type": "thinking", "thinking": "a", "signature": f"{PREFIX}1.x"}]}
    asked = call(messages=[{"role": "user", "content": "q"}, turn, {"role": "user", "content": "r"}])
    made = TranslatedCall(asked, MessagesClient(), ChatUpstream(), has_marks=True)
    made.use(Memory(marks=MARKS))
    body = msgspec.json.decode(made.body(asked, "m", LOCAL))
    assert [message["role"] for message in body["messages"]] == ["user", "user"]


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_what_goes_out_comes_back(pieces: list[str]) -> None:
    """The mark of a block fits it, streamed or not."""
    events = [chunk({"reasoning_content": piece}) for piece in pieces]
    data, _ = translate([*events, chunk({"content": "x"}), chunk({}, "stop"), usage(), b"data: [DONE]\n\n"])
    streamed = message_of(data)["content"][0]
    whole = answer_of({"reasoning_content": "".join(pieces), "content": "x"})["content"][0]
    assert streamed == whole
    assert MARKS.fits(streamed["signature"], streamed["thinking"])


def test_only_marks_are_removed_for_anthropic() -> None:
    """Whether they fit or not. Signatures of Anthropic's, unsigned blocks, and texts that look like a mark stay, with
    every byte."""
    body = (
        b'{"model":"m", "messages" : [{"role":"assistant","content":[ {"type":"thinking","thinking":"a",'
        b'"signature":"EqQB"}, {"type":"thinking","thinking":"b","signature":"trigate.r9.x"},'
        b'{"type":"text","text":"see trigate.r1.", "n": 1.0}]},'
        b'{"role":"user","content":"trigate.r2. is no mark"}, {"role":"user","content":[{"type":"text",'
        b'"text":"\\"signature\\": \\"trigate.r2.\\""}]}]}'
    )
    rest = without_own_reasoning(body)
    assert b"trigate.r9" not in rest
    assert b'{"type":"thinking","thinking":"a","signature":"EqQB"}' in rest
    assert b'{"type":"text","text":"see trigate.r1.", "n": 1.0}' in rest
    assert b'{"role":"user","content":"trigate.r2. is no mark"}' in rest
    untouched = b'{ "messages": [ {"role":"user","content":[{"type":"text","text":"trigate.r2."}]} ] }'
    assert without_own_reasoning(untouched) is untouched
    assert not is_mark("EqQB")
