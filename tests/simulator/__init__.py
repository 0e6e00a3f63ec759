"""A simulation of the gateway in virtual time: `simulate(seed, requests)`. See ``docs/explanation/simulation.md``."""

from tests.simulator.world import Report, Violation, simulate

__all__ = ["Report", "Violation", "simulate"]
