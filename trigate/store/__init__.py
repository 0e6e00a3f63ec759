"""What outlives the process: sessions, runs, deliveries, the ledger's records."""
