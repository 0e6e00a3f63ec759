"""The benchmark of Trigate and, beside it, of other gateways. See ``docs/explanation/performance.md``.

It must not depend on the tests. Read `session` first. The modules, in the order in which a run uses them:

- `cli`: the command line;
- `session`: one run, which starts all processes, measures the gateways in turn and collects the results;
- `scenarios`: the kinds of load, and how a report of the load generator becomes numbers;
- `gateways`: how each gateway is started (``peers/*.toml``), called and stopped;
- `process`: child processes, their CPU time and memory;
- `load`: the load generator, a process of its own;
- `upstream`: the mock upstream, a process of its own;
- `wire`: the answers of the mock upstream, in three formats;
- `events`: chat completions and their events, which the tests' providers use too;
- `readiness`: the wrapper around `select` that the load generator and the mock upstream share;
- `distribution`: histograms, medians, ratios;
- `machine`: the description of the machine;
- `report`: tables and comparisons; `terminal` and `plots` show them;
- `acknowledgements`: durable acknowledgements of webhooks, compared with the disk's speed;
- `overload`: the latency of the admitted calls under overload;
- `formats`: calls in three formats, translated and as they are;
- `keys`: plain calls with keys, limits, prices and budgets, and without;
- `micro`: micro-benchmarks of pure modules, for pytest-benchmark.
"""
