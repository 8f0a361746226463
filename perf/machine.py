"""The machine that a measurement is made on: its name, its versions, and the memory that it has left."""

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from efcp.perf.source import commit

__all__ = ["available_bytes", "environment"]

PACKAGES = ("efcp", "torch", "triton", "numba")


@cache
def environment(device: torch.device, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """The columns of a row that say where it was measured: device, machine, threads, versions and commit.

    Args:
        packages: further ones whose versions matter.
    """

    def installed(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"no {name}"

    return {
        "device": device.type,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "versions": ", ".join([f"python {platform.python_version()}", *map(installed, (*PACKAGES, *packages))]),
        "commit": commit(),
    }


def available_bytes(device: torch.device) -> int:
    """Memory that can be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
