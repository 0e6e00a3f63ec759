"""One provider: slots, connections, requests and replies."""
