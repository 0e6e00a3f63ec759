"""How much keys, groups, models and all calls together may use: rates, tokens, concurrency and budgets.

Knows nothing of: HTTP, upstreams, how a call is served.
"""
