"""Slack, through its Events API and its Web API. Read `adapter` first; `messages` is pure, and only `api` sends
requests."""
