"""The benchmark of Trigate and, beside it, of other gateways. See ``docs/performance.md``.

It must not depend on the tests. Read `session` first. The modules, in the order in which a run uses them:

- `cli`: the command line;
- `session`: one run: starts all processes, measures the gateways in turn, collects the results;
- `scenarios`: what is measured, and how a reply of the load generator becomes numbers;
- `gateways`: how each gateway is started (``peers/*.toml``), called and stopped;
- `process`: child processes, their CPU time and memory;
- `load`: the load generator, a process of its own;
- `upstream`: the mock upstream, a process of its own;
- `events`: chat completions and their events, which the providers of the tests use, too;
- `readiness`: the wrapper around `select` that the load generator and the mock upstream share;
- `distribution`: histograms, medians, ratios;
- `machine`: the description of the machine that was measured on;
- `report`: tables and comparisons; `terminal` and `plots` show them;
- `acknowledgements`: durable acknowledgements of webhooks, compared with what the disk can do;
- `overload`: the latency of the admitted calls while more is asked for than can be served;
- `micro`: micro-benchmarks of pure modules, for pytest-benchmark.
"""
