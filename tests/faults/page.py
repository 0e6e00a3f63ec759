"""Writes ``docs/reference/faults.md`` from the catalogue: ``python -m tests.faults.page``."""

from __future__ import annotations

from pathlib import Path

from tests.faults.catalogue import CATALOGUE
from tests.faults.steps import Case, Fault, Refusal, Whole

INTRO = """\
# Faults

What a client gets when a provider does something wrong, or odd. Each line is tested: with a provider on real sockets
that does just that, for a stream and for a JSON answer, with one target and with a second one behind it that is well.
The client always has its answer before its deadline, and nothing is left of the call: no connection, no place, no task.

- *the whole answer*: the fault does not matter.
- A number is the status of an [error](errors.md), which is sent before anything of an answer was. With a second target,
  its answer comes instead, and the client does not notice. Where that is not so (*final*), the call itself was refused,
  or its time is over.
- *what came, then an error event* is a stream that had begun (COMMIT). It stays at status 200, and has no `[DONE]`.
  What came are whole events, and all that there were. A second target changes nothing; but where it says *can go on*,
  it does so with `on_truncation = "continue"`, and the client does not notice: [Attempts](../discussion/attempts.md).
- — means that there is no such fault.

Retries at the same target are switched off here, and so is the breaker: they change who answers, not what an answer can
be.

This page is made by `tests/faults/page.py` of `tests/faults/catalogue.py`.
"""


def page() -> str:
    """The page."""
    parts = [INTRO]
    for title, faults in CATALOGUE.items():
        parts.append(f"\n## {title}\n\n| what the provider does | a stream | JSON |\n|---|---|---|\n")
        parts += [f"| {fault.name} | {_cell(fault, 'one-stream')} | {_cell(fault, 'one-json')} |\n" for fault in faults]
    return "".join(parts)


def _cell(fault: Fault, case: Case) -> str:
    expected = fault.expected.get(case)
    if expected is None:
        return "—"
    if isinstance(expected, Refusal) and expected.final:
        return f"{expected}, *final*"
    if case == "one-stream" and isinstance(fault.expected.get("continued-stream"), Whole):
        return f"{expected}, *can go on*"
    return str(expected)


if __name__ == "__main__":
    page_path = Path(__file__).parents[2] / "docs" / "reference" / "faults.md"
    page_path.write_text(page(), encoding="utf-8")
