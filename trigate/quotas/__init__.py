"""How much keys, groups, models, upstreams and all calls together may use: rates, tokens, concurrency and budgets.

Knows nothing of: HTTP, upstreams, how a call is served. Read `quotas.counters` first, then `quotas.service`.
"""
