"""Checks what the simulator needs of the host: Triton, a CPU and a C compiler. It can be imported without them."""

import os
import platform
import shutil

TRITON_VERSION = (3, 4)  # the first one
CPU_FEATURES = {"avx2", "bmi2", "f16c", "fma"}  # of x86-64-v3, the target of compilation


def find_compiler() -> str | None:
    """Path of the C compiler: the one named by CC, else gcc; None if there is none."""
    return shutil.which(os.environ.get("CC") or "gcc")


def why_unavailable() -> str | None:
    """Why kernels cannot be simulated in this process, in words; None if they can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"gpusim needs Linux on x86-64, not {platform.system()} on {platform.machine()}"
    with open("/proc/cpuinfo") as info:
        features = next((line for line in info if line.startswith("flags")), "").split()
    if missing := CPU_FEATURES.difference(features):
        return f"gpusim needs a CPU with {', '.join(sorted(missing))}"
    if find_compiler() is None:
        return "gpusim needs gcc on PATH, or the name of a C compiler in CC"
    try:
        import triton
    except ImportError:
        return "gpusim needs triton, which is not installed"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < TRITON_VERSION:
        return f"gpusim needs triton {'.'.join(map(str, TRITON_VERSION))}, not {triton.__version__}"
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set: kernels are interpreted, not compiled"
    return None
