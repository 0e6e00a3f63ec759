"""`trigate.openai.multipart`: the short fields at the beginning of a form, however it is split."""

from __future__ import annotations

import pytest

from trigate.errors import BadRequest
from trigate.openai.multipart import FormHead, boundary_of

FORM = (
    b'--b-1\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
    b'--b-1\r\nContent-Disposition: form-data; name="file"; filename="a; name=\\"model\\".wav"\r\n'
    b"Content-Type: audio/wav\r\n\r\nRIFF\r\n--b-1x\r\n--b-\r\n\x00data\r\n"
    b"--b-1 \r\ncontent-disposition: form-data; name=stream\r\n\r\ntrue\r\n"
    b'--b-1\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\r\n--b-1--\r\nepilogue'
)
WANTED = ("model", "stream", "prompt")


def _read(*pieces: bytes) -> FormHead:
    head = FormHead(b"b-1", WANTED)
    for piece in pieces:
        head.feed(piece)
    return head


@pytest.mark.parametrize("form", [FORM, b"preamble\r\n" + FORM], ids=["plain", "with a preamble"])
def test_fields_whole_and_byte_by_byte(form: bytes) -> None:
    """The wanted fields are found in the same places whole, byte by byte, and with every split; files are no fields."""
    splits = [(form,), tuple(form[at : at + 1] for at in range(len(form)))]
    splits += [(form[:at], form[at:]) for at in range(len(form))]
    for pieces in splits:
        head = _read(*pieces)
        assert [head.text(name) for name in WANTED] == ["whisper-1", "true", ""]
        assert head.complete
        assert bytes(head.kept) == form


def test_a_field_is_found_before_the_file_has_arrived() -> None:
    """What has arrived is enough: the rest of the form is not needed."""
    head = _read(FORM[: FORM.index(b"RIFF")])
    assert head.text("model") == "whisper-1"
    assert head.text("stream") is None
    assert not head.complete


def test_the_last_of_several_counts() -> None:
    """As in JSON."""
    part = b'--b-1\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n'
    assert _read(part % b"a", part % b"b", b"--b-1--").text("model") == "b"


@pytest.mark.parametrize(
    "form",
    [b"x" * 20_000, b"--b-1x\r\n" + b"x" * 100, b"--b-1\r\n" + b"a: b\r\n" * 5000],
    ids=["no boundary", "another boundary", "a head without end"],
)
def test_what_is_no_form(form: bytes) -> None:
    """It is refused, also byte by byte, and nothing is searched for ever."""
    with pytest.raises(BadRequest):
        _read(form)
    with pytest.raises(BadRequest):
        _read(*(form[at : at + 100] for at in range(0, len(form), 100)))


def test_text_that_is_not_utf8() -> None:
    """A field is text."""
    head = _read(FORM.replace(b"whisper-1", b"\xff"))
    with pytest.raises(BadRequest, match="model is not UTF-8"):
        head.text("model")


@pytest.mark.parametrize("value", [b"multipart/form-data", b"multipart/form-data; boundary=" + b"x" * 71])
def test_no_boundary(value: bytes) -> None:
    """A form has a boundary of 1 to 70 bytes."""
    with pytest.raises(BadRequest, match="boundary"):
        boundary_of(value)
