"""Writes ``docs/reference/faults.md`` from the catalogue: ``python -m tests.faults.page``."""

from __future__ import annotations

from pathlib import Path

from tests.faults.catalogue import CATALOGUE
from tests.faults.fault import Case, Complete, Fault, Refusal

INTRO = """\
# Faults

This page lists what a client gets when a provider does something wrong or unusual. Every line is tested with a provider
on real sockets that does exactly this, for a stream and for a JSON answer, with one target and with a second one that
works. The client always gets its answer before its deadline, and the call leaves no connection, slot or task behind.

- *the whole answer*: the fault has no effect.
- A number is the status of an [error](errors.md), which the gateway sends before any part of an answer. With a second
  target, the client gets the answer of that target instead and does not notice the fault. A line marked *final* is the
  exception: the call itself was refused, or its deadline has passed.
- *what came, then an error event*: the stream had already begun (COMMIT). Its status stays 200, and it has no `[DONE]`.
  The client gets all events that had arrived completely, then the error. A second target changes nothing, except in the
  lines marked *can go on*: with `on_truncation = "continue"`, the second target continues the stream, and the client
  does not notice the fault: [Attempts](../explanation/attempts.md).
- —: this fault does not exist for this kind of answer.

Retries at the same target and the circuit breaker are switched off in these tests. They change which target answers,
but not what an answer can be.

`tests/faults/page.py` generates this page from `tests/faults/catalogue.py`.
"""

SYSTEM = """
## The gateway's own system

A failure of the system (no file descriptor, thread or memory left; a full, failing or read-only disk) is the failure of
the operation that met it, and of nothing else. The tests inject each error in each of these places.

| what fails | what happens |
|---|---|
"""
SYSTEM_FAULTS = {
    "Silent connections, more than there are [descriptors](../how-to/deploy.md#file-descriptors)": (
        "Those that have been idle the longest are closed; calls are served"
    ),
    "Connections with a request, more than there are descriptors": (
        "New ones get 503 `overloaded` or are closed; the others continue"
    ),
    "Accepting a connection": "Connections that wait are closed, and accepting is tried again after 0.1 s",
    "Connecting to an upstream, for lack of a descriptor, a thread or memory": (
        "It takes the descriptor of an idle connection, else 503 `overloaded`; "
        "the state of the upstream and its breaker do not change"
    ),
    "Watching a socket": "That stream ends with an error",
    "Opening, reading or writing the store, or a lock on it for more than 5 s": (
        "503 `store_unavailable` for what needs the store, which is opened again after 0.25 s"
    ),
    "The journal of the ledger": "Calls are served; records wait in memory for the store",
    "A journal that is cut or damaged at any byte": "Its other lines are recorded",
    "The sockets by which workers notify each other": "The worker joins the others later",
    "Starting the process of a worker, or of the embedded model": "It is tried again after a pause",
    "Reading the configuration at a reload": "The configuration stays, and the log says so",
    "Loading the control plane at its first request": "503 `overloaded`; the next request tries again",
    "Writing a line of the log": "The line is dropped",
}
"""What fails, and what happens then."""


def page() -> str:
    """Returns the text of the page."""
    parts = [INTRO]
    for title, faults in CATALOGUE.items():
        parts.append(f"\n## {title}\n\n| what the provider does | a stream | JSON |\n|---|---|---|\n")
        parts += [f"| {fault.name} | {_cell(fault, 'one-stream')} | {_cell(fault, 'one-json')} |\n" for fault in faults]
    parts.append(SYSTEM)
    parts += [f"| {what} | {then} |\n" for what, then in SYSTEM_FAULTS.items()]
    return "".join(parts)


def _cell(fault: Fault, case: Case) -> str:
    expected = fault.expected.get(case)
    if expected is None:
        return "—"
    if isinstance(expected, Refusal) and expected.final:
        return f"{expected}, *final*"
    if case == "one-stream" and isinstance(fault.expected.get("continued-stream"), Complete):
        return f"{expected}, *can go on*"
    return str(expected)


if __name__ == "__main__":
    page_path = Path(__file__).parents[2] / "docs" / "reference" / "faults.md"
    page_path.write_text(page(), encoding="utf-8")
