"""Run compiled Triton and Gluon kernels on the CPU: a functional simulator of NVIDIA GPUs, for tests.

README.md says what it proves and how to use it. `simulate` needs Triton, but the package can be
imported without it; `why_unavailable` tells what is missing.
"""

from typing import TYPE_CHECKING, Any

from .counters import Access, Counters, Launch
from .errors import (
    DataRaceError,
    DeadlockError,
    DeviceAssertError,
    MisalignedError,
    OutOfBoundsError,
    SimulationError,
    UnsupportedError,
)
from .host import why_unavailable

if TYPE_CHECKING:
    from .simulator import Simulator, simulate

__all__ = [
    "Access",
    "Counters",
    "DataRaceError",
    "DeadlockError",
    "DeviceAssertError",
    "Launch",
    "MisalignedError",
    "OutOfBoundsError",
    "SimulationError",
    "Simulator",
    "UnsupportedError",
    "simulate",
    "why_unavailable",
]


def __getattr__(name: str) -> Any:
    if name in ("Simulator", "simulate"):  # these import Triton
        from . import simulator

        return getattr(simulator, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
