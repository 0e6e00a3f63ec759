"""``./scripts/soak``: simulates one world after the other and prints the command that reproduces a violation. With
``--real``, it runs a gateway on real sockets instead (`sockets`)."""

from __future__ import annotations

import argparse
import itertools
import secrets
import sys
import time

from tests.simulator import sockets
from tests.simulator.world import Violation, simulate

REQUESTS = 2000
REAL_MINUTES = 8.0


def main(arguments: list[str]) -> int:
    """Returns the exit status; 1 means that an invariant was violated."""
    parser = argparse.ArgumentParser(prog="./scripts/soak", description="Simulates the gateway in virtual time.")
    parser.add_argument("--seed", type=int, help="seed of the first world; random by default")
    parser.add_argument("--requests", type=int, default=REQUESTS, help=f"requests in each world; {REQUESTS} by default")
    parser.add_argument("--minutes", type=float, default=0.0, help="continue with the next seeds for this many minutes")
    parser.add_argument("--real", action="store_true", help="a gateway on real sockets, for 8 minutes by default")
    options = parser.parse_args(arguments)
    first = options.seed if options.seed is not None else secrets.randbelow(10**9)
    if options.real:
        return _soak_sockets(60 * (options.minutes or REAL_MINUTES), first)
    ends_at = time.monotonic() + 60 * options.minutes
    for seed in itertools.count(first):
        begun = time.monotonic()
        try:
            report = simulate(seed, options.requests)
        except Violation as violation:
            print(*violation.lines, sep="\n")
            print(f"\n{violation}\nagain: ./scripts/soak --seed {seed} --requests {options.requests}", flush=True)
            return 1
        print(f"seed {seed}: {report} in {time.monotonic() - begun:.1f} s", flush=True)
        if time.monotonic() >= ends_at:
            break
    return 0


def _soak_sockets(duration_s: float, seed: int) -> int:
    try:
        report = sockets.soak(duration_s, seed, note=lambda line: print(line, flush=True))
    except sockets.SoakFailed as failed:
        print(f"{failed}\nagain: ./scripts/soak --real --seed {seed} --minutes {duration_s / 60:g}", flush=True)
        return 1
    for outcome, times in report.outcomes.most_common():
        print(f"  {times:7} {outcome}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
