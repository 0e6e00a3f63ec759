"""The benchmark: what anyone can run, on Trigate and on the gateways beside it. See ``docs/performance.md``.

The rooms, in the order in which a run walks them:

- `cli`: the command line;
- `session`: one run: starts everything, takes turns between the gateways, gathers the result;
- `scenarios`: what is measured, and how a reply of the load generator becomes numbers;
- `gateways`: how each gateway is started (``peers/*.toml``), called and stopped;
- `process`: child processes, their CPU time and memory;
- `load`: the load generator, a process of its own;
- `upstream`: the mock upstream, a process of its own;
- `readiness`: the few lines of `select` that those two share;
- `distribution`: histograms, medians, ratios;
- `machine`: what it was measured on;
- `report`: tables and comparisons; `terminal` and `plots` show them;
- `acknowledgements`: durable acknowledgements of webhooks, beside what the disk can do;
- `overload`: what becomes of those who are let in while too much is asked;
- `rooms`: micro-benchmarks of the pure rooms, for pytest-benchmark.
"""
