"""A kernel compiled for the host."""

import ctypes
import json
from dataclasses import asdict
from pathlib import Path

from .build import build_ir, cached, runtime
from .errors import UnsupportedError
from .ir import KINDS, Site
from .lower import lower
from .native import NativeSite


class Program:
    """A kernel as native code, from the cache if possible.

    Attributes:
        params: LLVM types of the kernel's parameters
        sites: its memory accesses and barriers, as numbered in the code
        native_sites: the same for the runtime
        barriers: which of the sites are barriers
        tables: extents in memory of the constant tables that come with the code
        needs_fibers: the kernel has a barrier or a warp operation
        entry: address of the code
    """

    def __init__(self, llir: str, name: str, fp_fusion: bool) -> None:
        """Compile the kernel `name` of a module of LLVM IR for NVIDIA.

        Raises:
            UnsupportedError: the kernel needs something that the simulator does not have.
        """

        def build(folder: Path) -> None:
            try:
                lowered = lower(llir, name, lambda function: hasattr(runtime(), function))
            except UnsupportedError as e:
                raise UnsupportedError(f"{name}: {e}") from e
            folder.mkdir()
            description = asdict(lowered)
            build_ir(description.pop("ir"), folder, fp_fusion)
            (folder / "kernel.json").write_text(json.dumps(description))

        key = "\0".join([name, str(fp_fusion), llir])
        folder = cached(name[:80], key.encode(), build)
        description = json.loads((folder / "kernel.json").read_text())
        self.params: list[str] = description["params"]
        self.sites = [Site(**site) for site in description["sites"]]
        self.needs_fibers: bool = description["needs_fibers"]
        native_sites = [NativeSite(KINDS.index(site.kind), site.align) for site in self.sites]
        self.native_sites = (NativeSite * len(native_sites))(*native_sites)
        self.barriers = [number for number, site in enumerate(self.sites) if site.kind == "barrier"]
        runtime()  # loaded first, as the code refers to it
        self.library = ctypes.CDLL(str(folder / "kernel.so"))
        self.entry = ctypes.cast(self.library.gs_entry, ctypes.c_void_p)
        self.tables = []
        for symbol, size in description["tables"]:
            begin = ctypes.addressof(ctypes.c_char.in_dll(self.library, symbol))
            self.tables.append((begin, begin + size))
