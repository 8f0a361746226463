"""Instructions of inline PTX that touch memory or other threads."""

import re
from collections.abc import Callable

from .ir import LLVM_TYPE, Site, bits_of, split_args
from .ptx_arithmetic import Arithmetic

STRONG = {"volatile", "relaxed", "acquire", "release", "mmio"}
# of atom and red: on signed integers, on other integers and bits, on floats
ATOMIC_OPERATION = {
    "exch": ("xchg", "xchg", "xchg"),
    "add": ("add", "add", "fadd"),
    "min": ("min", "umin", "fmin"),
    "max": ("max", "umax", "fmax"),
    "and": ("and", "and", None),
    "or": ("or", "or", None),
    "xor": ("xor", "xor", None),
    "inc": ("uinc_wrap", "uinc_wrap", None),
    "dec": ("udec_wrap", "udec_wrap", None),
}


class Instructions(Arithmetic):
    """A snippet that knows all the instructions."""

    # memory

    def space(self) -> str:
        """The memory that the instruction accesses: global or shared."""
        for mod in self.mods:
            if mod in ("global", "shared", "shared::cta"):
                return mod.split("::")[0]
        raise self.unsupported()

    def add_site(self, kind: str, align: int) -> str:
        """Number the current instruction as a site; returns the number's value."""
        value = self.let(f"add i32 %site, {len(self.sites)}") if self.sites else "%site"
        self.sites.append(Site(kind, ".".join([self.opcode, *self.mods]), align))
        return value

    def active(self, condition: str | None) -> str:
        """A guard as the argument `active` of the runtime."""
        return self.let(f"zext i1 {condition} to i32") if condition else "1"

    def check(self, space: str, kind: str, pointer: str, size: str, align: int, condition: str | None) -> str:
        """Have the runtime check and count an access of `size` bytes; returns the host address."""
        site, active = self.add_site(f"{space}_{kind}", align), self.active(condition)
        return self.call("ptr", f"gs_{space}", f"ptr {pointer}", f"i32 {size}", f"i32 {site}", f"i32 {active}")

    def address(self, kind: str, operand: str, size: int) -> str:
        """The host address of an operand in brackets, checked."""
        return self.check(self.space(), kind, self.get_pointer(operand), str(size), size, self.guard)

    def guarded(self, destinations: list[str], bits: int, body: Callable[[], list[str]]) -> None:
        """Run the code that `body` writes where the guard holds, and assign its values to the destinations."""
        guard, self.guard = self.guard, None
        if guard is None:
            values = body()
        else:
            before, label = self.block, f"do{self.count}"
            old = [self.get(d, bits) if d in self.regs else "0" for d in destinations]
            self.emit(f"br i1 {guard}, label %{label}, label %{label}.end")
            self.start_block(label)
            new = body()
            inner = self.block
            self.emit(f"br label %{label}.end")
            self.start_block(f"{label}.end")
            pairs = zip(new, old, strict=False)  # the result of a reduction has no destination
            values = [self.let(f"phi i{bits} [ {v}, %{inner} ], [ {o}, %{before} ]") for v, o in pairs]
        for d, v in zip(destinations, values, strict=False):
            self.set(d, v, bits, signed=self.type.startswith("s"))

    def vector(self, operand: str) -> tuple[list[str], int]:
        """Registers of a (vector) operand, and the width of each in bits."""
        regs = split_args(operand.strip("{} ")) if operand.startswith("{") else [operand]
        lanes = next((int(m[1:]) for m in self.mods if re.fullmatch(r"v\d", m)), 1)
        m = re.fullmatch(r"b?[bsuf]+(\d+)(x2)?", self.type)
        if not m or len(regs) != lanes:
            raise self.unsupported()
        return regs, int(m[1]) * (2 if m[2] else 1)

    def element(self, base: str, i: int, bits: int) -> str:
        """The address of element i."""
        return self.let(f"getelementptr i8, ptr {base}, i64 {i * bits // 8}") if i else base

    def op_ld(self, destination: str, address: str, *cache_policy: str) -> None:
        regs, bits = self.vector(destination)
        base = self.address(self.access("load"), address, len(regs) * bits // 8)

        def body() -> list[str]:
            pointers = (self.element(base, i, bits) for i in range(len(regs)))
            return [self.let(f"load i{bits}, ptr {pointer}, align 1") for pointer in pointers]

        self.guarded(regs, bits, body)

    def op_st(self, address: str, source: str, *cache_policy: str) -> None:
        regs, bits = self.vector(source)
        base = self.address(self.access("store"), address, len(regs) * bits // 8)
        values = [self.get(r, bits) for r in regs]

        def body() -> list[str]:
            for i, v in enumerate(values):
                self.emit(f"store i{bits} {v}, ptr {self.element(base, i, bits)}, align 1")
            return []

        self.guarded([], bits, body)

    def access(self, kind: str) -> str:
        """The kind of a load or store; strong ones count as atomic, since they do not race with atomics."""
        return kind if STRONG.isdisjoint(self.mods) else "atomic"

    def op_atom(self, destination: str, address: str, source: str, swap: str = "", *cache_policy: str) -> None:
        regs, bits = self.vector(source)
        base = self.address("atomic", address, len(regs) * bits // 8)
        values = [self.get(r, bits) for r in regs]
        results = split_args(destination.strip("{} ")) if destination else []

        def body() -> list[str]:
            if "cas" in self.mods:
                new = self.get(swap, bits)
                pair = self.let(f"cmpxchg ptr {base}, i{bits} {values[0]}, i{bits} {new} seq_cst seq_cst")
                return [self.let(f"extractvalue {{ i{bits}, i1 }} {pair}, 0")]
            return [self.atomic(self.element(base, i, bits), v, self.type, bits) for i, v in enumerate(values)]

        self.guarded(results, bits, body)

    def op_red(self, address: str, source: str, *cache_policy: str) -> None:
        self.op_atom("", address, source)

    def atomic(self, pointer: str, value: str, ptx_type: str, bits: int) -> str:
        """Read, modify and write an element; returns what it was."""
        if ptx_type.endswith("x2"):  # the halves are updated independently
            half, old = bits // 2, []
            for i in range(2):
                v = self.let(f"trunc i{bits} {self.let(f'lshr i{bits} {value}, {i * half}')} to i{half}")
                v = self.atomic(self.element(pointer, i, half), v, ptx_type[:-2], half)
                old.append(self.let(f"zext i{half} {v} to i{bits}"))
            return self.let(f"or i{bits} {old[0]}, {self.let(f'shl i{bits} {old[1]}, {half}')}")
        on_signed, on_bits, on_floats = next(ATOMIC_OPERATION[m] for m in self.mods if m in ATOMIC_OPERATION)
        if ptx_type not in LLVM_TYPE:
            operation = on_signed if ptx_type.startswith("s") else on_bits
            return self.let(f"atomicrmw {operation} ptr {pointer}, i{bits} {value} seq_cst")
        if on_floats is None:
            raise self.unsupported()
        ty = LLVM_TYPE[ptx_type]
        value = self.let(f"bitcast i{bits} {value} to {ty}")
        before = self.let(f"atomicrmw {on_floats} ptr {pointer}, {ty} {value} seq_cst")
        return self.let(f"bitcast {ty} {before} to i{bits}")

    def op_cp(self, *operands: str) -> None:
        if self.mods[0] != "async":
            raise self.unsupported()
        if self.mods[1] == "commit_group":
            self.call_void("nvvm_cp_async_commit_group")
        elif self.mods[1] == "wait_all":
            self.call_void("nvvm_cp_async_wait_all")
        elif self.mods[1] == "wait_group":
            self.call_void("nvvm_cp_async_wait_group", f"i32 {int(operands[0], 0)}")
        elif self.mods[1] in ("ca", "cg"):
            self.copy(*operands)
        else:
            raise self.unsupported()

    def copy(self, target: str, source: str, nbytes: str, source_bytes: str = "", *cache_policy: str) -> None:
        """cp.async; it zeroes what lies beyond `source_bytes`."""
        dst, src, size = self.get_pointer(target), self.get_pointer(source), int(nbytes, 0)
        read = self.get(source_bytes, 32) if source_bytes else str(size)
        reads = self.let(f"icmp ne i32 {read}, 0")
        if self.guard:
            reads = self.let(f"and i1 {reads}, {self.guard}")
        dst = self.check("shared", "store", dst, str(size), size, self.guard)
        src = self.check("global", "load", src, read, size, reads)
        active = self.active(self.guard)
        self.call_void("gs_cp_async", f"ptr {dst}", f"ptr {src}", f"i32 {size}", f"i32 {read}", f"i32 {active}")

    def op_createpolicy(self, destination: str, *rest: str) -> None:
        self.set(destination, "0", 64)

    def no_op(self, *operands: str) -> None:
        """An instruction without effect, as there are no caches and memory is sequentially consistent."""

    op_membar = op_fence = op_griddepcontrol = op_prefetch = op_discard = op_applypriority = no_op

    # synchronisation and warp operations

    def op_bar(self, *operands: str) -> None:
        self.no_guard()
        site = self.add_site("barrier", 1)
        if "warp" in self.mods:
            self.call_void("nvvm_bar_warp_sync", f"i32 {self.get(operands[0], 32)}", f"i32 {site}")
        elif "sync" in self.mods:
            number, count = (self.get(o, 32) for o in (*operands, "0")[:2])
            self.call_void("nvvm_barrier_cta_sync_count", f"i32 {number}", f"i32 {count}", f"i32 {site}")
        else:
            raise self.unsupported()

    op_barrier = op_bar

    def op_shfl(self, destination: str, source: str, lane: str, clamp: str, mask: str) -> None:
        self.no_guard()
        operands = [f"i32 {self.get(o, 32)}" for o in (mask, source, lane, clamp)]
        pair = self.call("{ i32, i1 }", f"nvvm_shfl_sync_{self.mods[1]}_i32p", *operands)
        register, _, predicate = destination.partition("|")
        self.set(register, self.let(f"extractvalue {{ i32, i1 }} {pair}, 0"), 32)
        if predicate:
            self.set(predicate, self.let(f"extractvalue {{ i32, i1 }} {pair}, 1"), 1)

    def op_vote(self, destination: str, predicate: str, mask: str) -> None:
        self.no_guard()
        ty = "i32" if self.mods[1] == "ballot" else "i1"
        operands = f"i32 {self.get(mask, 32)}", f"i1 {self.get(predicate, 1)}"
        self.set(destination, self.call(ty, f"nvvm_vote_{self.mods[1]}_sync", *operands), bits_of(ty))

    def op_match(self, destination: str, value: str, mask: str) -> None:
        self.no_guard()
        if self.mods[0] != "any":
            raise self.unsupported()
        bits = self.int_bits()
        operands = f"i32 {self.get(mask, 32)}", f"i{bits} {self.get(value, bits)}"
        self.set(destination, self.call("i32", f"nvvm_match_any_sync_i{bits}", *operands), 32)

    def op_redux(self, destination: str, value: str, mask: str) -> None:
        self.no_guard()
        if self.type == "f32":
            raise self.unsupported()
        operation = self.mods[1]
        if self.type == "u32" and operation in ("min", "max"):
            operation = "u" + operation
        operands = f"i32 {self.get(value, 32)}", f"i32 {self.get(mask, 32)}"
        self.set(destination, self.call("i32", f"nvvm_redux_sync_{operation}", *operands), 32)

    def op_activemask(self, destination: str) -> None:
        self.set(destination, self.call("i32", "nvvm_activemask"), 32)

    def op_trap(self) -> None:
        def body() -> list[str]:
            self.call_void("gs_trap")
            return []

        self.guarded([], 32, body)
