"""The ledger: one durable record for each exchange, however it ended.

It reads the state of an exchange (`LedgerEntry`), and must not contain how one is served. Read `ledger` first;
`journal` is a file that survives the process.
"""

from trigate.ledger.ledger import Ledger, LedgerStatistics, open_ledger

__all__ = ["Ledger", "LedgerStatistics", "open_ledger"]
