"""HTTP for any ASGI application."""
