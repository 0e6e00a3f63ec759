"""One durable record for each exchange."""
