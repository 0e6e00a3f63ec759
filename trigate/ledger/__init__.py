"""The ledger: one durable record for each exchange, however it ended.

It knows what an exchange shows of itself (`LedgerEntry`), and must not know how one is served. Read `ledger` first;
`journal` is the file that survives the process.
"""

from trigate.ledger.ledger import Ledger, LedgerEntry, LedgerStatistics, open_ledger

__all__ = ["Ledger", "LedgerEntry", "LedgerStatistics", "open_ledger"]
