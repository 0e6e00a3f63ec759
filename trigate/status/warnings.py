"""What an administrator should know of a configuration that is in force. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from trigate.config.sections import Config
from trigate.status.schema import Status


def warnings(config: Config, status: Status) -> Iterator[str]:
    """Yields one sentence for each thing that does not work, or that surprises.

    Args:
        config: The configuration of this worker.
        status: The state of all workers.
    """
    if status.reload_error is not None:
        yield f"The last reload was refused, so the configuration before it is in force: {status.reload_error}"
    if config.server.insecure and not config.keys and config.admin.key is None:
        yield "No key is configured, and server.insecure is set: anybody who reaches the gateway can use it."
    for name, reason in config.disabled.items():
        yield f"{name if name.startswith('channels.') else f'upstreams.{name}'} is disabled: {reason.rstrip('.')}."
    for upstream in status.upstreams:
        if upstream.state == "down":
            why = upstream.reason or upstream.last_error or "no reason is known"
            yield f"upstreams.{upstream.name} is down: {why.rstrip('.')}."
    if not config.upstreams:
        yield "No upstream is configured."
    if status.store.kind == "memory":
        yield "The store is in memory: sessions, keys and records are gone when the gateway ends."
    if status.store.error is not None:
        yield f"The store is unavailable: {status.store.error.rstrip('.')}."
    if status.ledger is not None and status.ledger.state != "ok":
        yield f"The ledger is {status.ledger.state}" + (f": {status.ledger.error}." if status.ledger.error else ".")
    if status.prices.unknown:
        yield f"No price is known, so calls have no cost: {', '.join(status.prices.unknown)}."
