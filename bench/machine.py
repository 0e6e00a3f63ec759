"""The machine of a result. It contains no names of the host or its user, since results are published."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import attrs


@attrs.frozen(kw_only=True)
class Machine:
    """A machine.

    Attributes:
        cores: The cores that this process may use.
        load_1m: The load before the run; None where the system does not report it.
    """

    cpu: str
    cores: int
    memory_gib: float
    kernel: str
    python: str
    load_1m: float | None


def this_machine() -> Machine:
    """Describes this machine."""
    return Machine(
        cpu=_cpu(),
        cores=usable_cores(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        load_1m=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    )


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return " ".join(value.split())
    return platform.processor() or platform.machine()
