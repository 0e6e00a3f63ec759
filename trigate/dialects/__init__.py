"""Formats of requests and answers, and one vocabulary between them. Pure: no clock, no socket, no await.

Each format has a package: `anthropic` (Messages) and `openai_chat` (chat completions). A package translates between its
format and the vocabulary, in one direction or in both: it decodes what arrives in its format, and encodes what is sent
in it. No package knows another one, so a format is added without a change to the others.

Read first `vocabulary`, then `formats`, which says what a package provides, and `translated_call`, which joins the two
sides. Which format goes to which upstream is decided elsewhere (`trigate.exchange.translation`).

The rules of every format:

* What the other side cannot express is never dropped in silence. If the answer would be another one without it, the
  request is refused with a 400 that names the field. If it is advisory, its name is returned as *dropped*, and the
  client gets it in the header ``x-trigate-dropped``. ``docs/reference/formats.md`` lists both, and a test compares it
  with the code.
* The same content gives the same ids and texts, whether an answer is streamed or not.
* A decoder of events raises `ProtocolViolation` for a stream that makes no sense. It never ends such a stream as
  complete.
"""
