"""The ledger: one durable record for each exchange, however it ended.

It begins a record, and keeps it once its caller has completed it; it must not know how an exchange is served. Read
`ledger` first; `journal` is a file that survives the process.
"""

from trigate.ledger.ledger import Ledger, LedgerStatistics, open_ledger

__all__ = ["Ledger", "LedgerStatistics", "open_ledger"]
