"""Telegram, through its Bot API. Read `adapter` first; `messages` is pure, and only `api` sends requests."""
