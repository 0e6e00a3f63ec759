"""`POST /hooks/NAME`."""
