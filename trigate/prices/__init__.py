"""What a call costs: the prices of models, and their arithmetic. Pure.

Knows nothing of: calls, keys, budgets, clocks. Read `prices.price` first.
"""
