"""Small tools for Trio that know nothing of HTTP or models: polling, timers, fairness, rate limits."""
