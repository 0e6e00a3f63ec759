"""What the operations of a store do. They are written once, and every store runs them.

An operation is a synchronous function of `trigate.store.tables.Tables`, inside one transaction. It reads values and
puts changed values back. A store keeps the tables and runs the operations in order (`transactions.Transactions`): each
operation is applied completely, or not at all. If an operation raises, the store rolls back what it has changed.

Read `store` first: it puts the parts together and deletes old rows. A module here imports only `transactions`, the
tables and the modules whose rows its transactions change too.
"""
