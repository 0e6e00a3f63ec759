"""Durable state: sessions, runs, deliveries, the ledger's records.

The store knows values and how to keep them. It does not know what a run does, what a session is for, or which owner
may see a row. Read `interface` first: the protocols of the store and the rules that every implementation follows.

* `records`: the values that the store keeps.
* `operations`: what each operation does, as functions over `tables`; the same for every store.
* `tables`, `schema`: the SQL.
* `sqlite`, `sqlite_file`: the store in a file, which all workers of a machine share.
* `memory`: the same tables in memory.
* `opening`, `retention`: which store a configuration needs, and when old rows are deleted from it.

Only `sqlite` and `memory` import SQLite, and `opening` imports one of the two when a gateway starts.
"""

from trigate.store.interface import Store, Write

__all__ = ["Store", "Write"]
