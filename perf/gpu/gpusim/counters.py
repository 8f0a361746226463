"""Counters of a launch's memory accesses, in the units in which a GPU counts.

A request is what the active lanes of one warp ask for in one execution of one instruction. A request to global memory
is served in 32-byte sectors; one to shared memory in wavefronts, each of which reads at most one word of every bank.
"""

from dataclasses import dataclass, field

from .ir import ACCESS_KINDS, Site

SECTOR_BYTES = 32


@dataclass
class Access:
    """Memory accesses of one kind, or at one site."""

    requests: int = 0  # of warps, with at least one active lane
    lanes: int = 0
    bytes: int = 0  # that the lanes ask for
    sectors: int = 0  # global memory: distinct ones of each request
    wavefronts: int = 0  # shared memory

    @property
    def efficiency(self) -> float:
        """Bytes asked for, per byte of the sectors touched: 1 for coalesced accesses to global memory."""
        return self.bytes / (SECTOR_BYTES * self.sectors) if self.sectors else 1.0

    def __add__(self, other: "Access") -> "Access":
        return Access(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class Counters:
    """Counts of one launch."""

    ctas: int
    barriers: int  # CTA-wide barriers passed, summed over CTAs
    shuffles: int  # warp-wide shuffles, votes and reductions, summed over warps
    sites: list[tuple[Site, Access]] = field(repr=False)  # every static access, in program order
    global_load: Access = field(init=False)
    global_store: Access = field(init=False)
    global_atomic: Access = field(init=False)  # volatile and other strong accesses included
    shared_load: Access = field(init=False)
    shared_store: Access = field(init=False)
    shared_atomic: Access = field(init=False)

    def __post_init__(self) -> None:
        for kind in ACCESS_KINDS:
            setattr(self, kind, sum((access for site, access in self.sites if site.kind == kind), Access()))

    @property
    def global_memory(self) -> Access:
        """All accesses to global memory."""
        return self.global_load + self.global_store + self.global_atomic

    def table(self) -> str:
        """The accesses per source line and instruction, as text."""
        rows: dict[tuple[str, str, str], Access] = {}
        for site, access in self.sites:
            key = (site.where, site.kind, site.op)
            rows[key] = rows.get(key, Access()) + access
        form = "{:<28}{:<15}{:>10}{:>12}{:>10}{:>11}{:>11}  {}"
        heads = ("source", "kind", "requests", "bytes", "sectors", "wavefronts", "efficiency", "instruction")
        lines = [form.format(*heads)]
        for (where, kind, op), a in rows.items():
            if kind.startswith("global"):
                lines.append(form.format(where, kind, a.requests, a.bytes, a.sectors, "", f"{a.efficiency:.2f}", op))
            else:
                lines.append(form.format(where, kind, a.requests, a.bytes, "", a.wavefronts, "", op))
        lines.append(f"per CTA: {self.barriers / self.ctas:g} barriers, {self.shuffles / self.ctas:g} shuffles")
        return "\n".join(lines)


@dataclass
class Launch:
    """One kernel launch that succeeded."""

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    shared_bytes: int  # shared memory of a CTA
    barrier_sites: int  # barriers in the code, also those within a warp; `drop_barriers` names them by number
    counters: Counters | None  # None without the option `counters`
