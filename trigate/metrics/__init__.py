"""Metrics: what there is to count, and how Prometheus reads it. Pure.

`families` lists every metric that ``GET /metrics`` has; read it first. `histogram` counts, and `exposition` writes the
text. The package knows neither who counts (`exchange.call_metrics`) nor how the workers of a machine answer together
(`status.scrape`).
"""
