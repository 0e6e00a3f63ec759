"""``./scripts/soak``: simulates world after world, and says how to see again what it found."""

from __future__ import annotations

import argparse
import itertools
import secrets
import sys
import time

from tests.simulator.world import Violation, simulate

REQUESTS = 2000


def main(arguments: list[str]) -> int:
    """Returns the exit status: 1 = something that must hold did not."""
    parser = argparse.ArgumentParser(prog="./scripts/soak", description="Simulates the gateway in virtual time.")
    parser.add_argument("--seed", type=int, help="of the first world; left out, a random one")
    parser.add_argument("--requests", type=int, default=REQUESTS, help=f"in each world; {REQUESTS} if left out")
    parser.add_argument("--minutes", type=float, default=0.0, help="go on with the next seeds for so long")
    options = parser.parse_args(arguments)
    first = options.seed if options.seed is not None else secrets.randbelow(10**9)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
