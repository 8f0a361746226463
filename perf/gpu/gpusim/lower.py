"""Rewrite the LLVM IR that Triton compiles for an NVIDIA GPU into IR for the host.

Input is the final IR of the NVIDIA backend, the text from which Triton goes on to PTX (`kernel.asm["llir"]`), as
Triton 3.8 writes it. It is rewritten line by line:

* inline PTX: a call of an equivalent IR function (ptx.py)
* llvm.nvvm.x.y: a call of nvvm_x_y in runtime.c
* load, store and atomicrmw of global or shared memory: the same on the address that gs_global or gs_shared returns,
  which check and count the access
* address spaces, metadata, attributes and the target are dropped

A pointer to shared memory stays what it is on the device, an offset from SHARED_BASE, which the runtime translates.
Every access and barrier gets a number, its site, so that the runtime can tell them apart.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from .errors import UnsupportedError
from .ir import SHARED_BASE, Site, balanced, bits_of, leading_type, split_args
from .ptx_memory import Instructions

_TAKES_SITE = {
    "barrier.cta.sync.aligned.all",
    "barrier.cta.sync.all",
    "barrier.cta.sync.aligned.count",
    "barrier.cta.sync.count",
    "bar.warp.sync",
}
_NO_EFFECT = re.compile(r"fence\.|membar\.|griddepcontrol\.|prefetch\.|nanosleep")
_EXTERNAL = {"__assertfail", "__nvvm_reflect"}
_WARP_OPERATION = re.compile(r"@(nvvm_(shfl|redux|vote|match|bar|barrier)_|gs_(ld|st)matrix)")


@dataclass(frozen=True)
class Lowered:
    """A kernel for the host."""

    ir: str  # its entry is `void @gs_entry(ptr)`, which takes an array of 8-byte argument slots
    params: list[str]  # LLVM types of the kernel's parameters
    sites: list[Site]
    tables: list[tuple[str, int]]  # symbol and bytes of constant tables in global memory, such as libdevice has
    needs_fibers: bool  # the kernel has a barrier or a warp operation


def lower(llir: str, kernel: str, runtime_has: Callable[[str], bool]) -> Lowered:
    """Rewrite a module.

    Args:
        llir: the module
        kernel: name of the kernel in it
        runtime_has: whether runtime.c implements a function

    Raises:
        UnsupportedError: the kernel needs something that has no equivalent.
    """
    return _Lowering(llir, kernel, runtime_has).result()


class _Lowering:
    def __init__(self, llir: str, kernel: str, runtime_has: Callable[[str], bool]) -> None:
        self.lines, self.kernel, self.runtime_has = llir.splitlines(), kernel, runtime_has
        self.locate = _source_locations(self.lines)
        self.where = ""  # source line of the current instruction
        self.sites: list[Site] = []
        self.tables: list[tuple[str, int]] = []
        self.declarations: dict[str, str] = {}  # by function
        self.snippets: dict[tuple[str, ...], tuple[str, list[Site]]] = {}  # by asm call and types: name, sites
        self.definitions: list[str] = []  # of functions that stand for inline PTX and matrix intrinsics
        self.temporaries = 0

    def result(self) -> Lowered:
        out: list[str] = []
        params = None
        for line in self.lines:
            if not line or line.startswith((";", "!", "target ", "source_filename", "attributes ", "module asm")):
                continue
            if line[0] == "@":
                out.append(self.global_variable(line))
            elif line.startswith("declare "):
                self.declaration(_without_metadata(line))
            elif line.startswith("define "):
                line = self.clean(_without_metadata(line)).replace(" ptx_kernel", "")
                _, is_kernel, arguments = line.partition(f"@{self.kernel}(")
                if is_kernel:
                    params = [leading_type(a) for a in split_args(balanced(arguments))]
                out.append(line)
            elif line[0] in " \t":
                m = re.search(r", !dbg !(\d+)", line)
                self.where = self.locate(m[1]) if m else ""
                out += self.instruction(_without_metadata(line))
            else:
                out.append(line)  # labels, closing braces
        if params is None:
            raise UnsupportedError(f"no kernel named {self.kernel} in the module")
        text = "\n".join([*out, *self.definitions, self.entry(params)])
        defined = set(re.findall(r"^define .*?@([\w.]+)\(", text, re.M))
        declarations = [line for name, line in self.declarations.items() if name not in defined]
        text = "\n".join([*declarations, text, ""])
        return Lowered(text, params, self.sites, self.tables, bool(_WARP_OPERATION.search(text)))

    @staticmethod
    def clean(text: str) -> str:
        """A text without attributes, address spaces and scopes of synchronisation."""
        text = text.replace("ptr addrspace(3) @global_smem", f"ptr inttoptr (i64 {SHARED_BASE} to ptr)")
        text = re.sub(r" #\d+(?=$|[,\s])", "", text)
        return re.sub(r" (addrspace\(\d+\)|syncscope\(\"[^\"]*\"\))", "", text)

    # module level

    def global_variable(self, line: str) -> str:
        if line.startswith("@global_smem"):
            return ""
        m = re.match(r"@([\w.$]+) = .*?addrspace\((\d+)\) (?:constant|global) (\[.*?\]|\w+) ", line)
        if m is None:
            return self.clean(line)
        if m[2] != "1":
            raise UnsupportedError(f"global variable {m[1]} in address space {m[2]}")
        self.tables.append((m[1], bits_of(m[3]) // 8))
        return self.clean(re.sub(r"= (internal|private) ", "= ", line))  # so that its address can be asked for

    def declaration(self, line: str) -> None:
        m = re.match(r"declare (.*?)@([\w.]+)\((.*)\)", self.clean(line))
        if m is None:
            raise UnsupportedError(f"`{line}`")
        name, types = m[2], [leading_type(a) for a in split_args(m[3])]
        ret = re.sub(r"range\([^)]*\)|noundef|zeroext|signext|nonnull", "", m[1]).strip()
        if name.startswith("llvm.nvvm."):
            self.intrinsic_declaration(name.removeprefix("llvm.nvvm."), ret, types)
        elif name != "llvm.trap":
            if not name.startswith("llvm.") and name not in _EXTERNAL:
                raise UnsupportedError(f"call of {name}")
            self.declarations[name] = f"declare {ret} @{name}({', '.join(types)})"

    def intrinsic_declaration(self, name: str, ret: str, types: list[str]) -> None:
        symbol = _symbol(name)
        if m := re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.b16(\.p3)?", name):
            self.matrix_function(symbol, m[1], int(m[2]), bool(m[3]))
        elif not _NO_EFFECT.match(name):
            types = types + ["i32"] * (name in _TAKES_SITE)
            self.declare_native(symbol, f"declare {ret} @{symbol}({', '.join(types)}) nounwind")

    def declare_native(self, symbol: str, declaration: str) -> None:
        if symbol.startswith("nvvm_") and not self.runtime_has(symbol):
            raise UnsupportedError(f"intrinsic {symbol}")
        self.declarations[symbol] = declaration

    def matrix_function(self, symbol: str, direction: str, count: int, transposed: bool) -> None:
        """Define ldmatrix or stmatrix as a call of the runtime's function.

        The intrinsic has a register for each matrix, and the runtime's function has an array.
        """
        registers = [f"%r{i}" for i in range(count)]
        call = f"call void @gs_{direction}matrix(ptr %m, ptr %p, i32 {count}, i32 {int(transposed)}, i32 %site)"
        body = [f"%m = alloca [{count} x i32]"]
        body += [f"%a{i} = getelementptr i32, ptr %m, i32 {i}" for i in range(count)]
        if direction == "st":
            ret, params = "void", ", ".join(["ptr %p", *(f"i32 {r}" for r in registers)])
            body += [*(f"store i32 {r}, ptr %a{i}" for i, r in enumerate(registers)), call, "ret void"]
        else:
            ret, params = "i32" if count == 1 else f"{{ {', '.join(['i32'] * count)} }}", "ptr %p"
            body += [call, *(f"{r} = load i32, ptr %a{i}" for i, r in enumerate(registers))]
            value = "%r0" if count == 1 else "poison"
            for i, r in enumerate(registers if count > 1 else []):
                body.append(f"%v{i} = insertvalue {ret} {value}, i32 {r}, {i}")
                value = f"%v{i}"
            body.append(f"ret {ret} {value}")
        head = f"define internal {ret} @{symbol}({params}, i32 %site) {{"
        self.definitions.append("\n  ".join([head, *body]) + "\n}")
        self.declarations[f"gs_{direction}matrix"] = f"declare void @gs_{direction}matrix(ptr, ptr, i32, i32, i32)"

    def entry(self, params: list[str]) -> str:
        lines = ["define dso_local void @gs_entry(ptr %args) {"]
        for i, ty in enumerate(params):
            lines.append(f"  %p{i} = getelementptr i8, ptr %args, i64 {8 * i}")
            lines.append(f"  %v{i} = load {ty}, ptr %p{i}")
        values = ", ".join(f"{ty} %v{i}" for i, ty in enumerate(params))
        return "\n".join([*lines, f"  call void @{self.kernel}({values})", "  ret void", "}"])

    # instructions

    def instruction(self, line: str) -> list[str]:
        """The lines that replace one instruction."""
        if re.search(r"addrspace\([24-7]\)|addrspacecast|inttoptr .* to ptr(?! addrspace)", line):
            raise UnsupportedError(f"address space of `{line.strip()}`")  # its accesses would bypass the checks
        if " asm " in line:
            return [self.inline_ptx(line)]
        if "@llvm.nvvm." in line:
            return self.intrinsic_call(line)
        if "@llvm.trap" in line:
            self.declarations["gs_trap"] = "declare void @gs_trap()"
            return [self.clean(line.replace("@llvm.trap", "@gs_trap"))]
        if re.search(r"@llvm\.(?!lifetime|assume|invariant).*ptr addrspace\([13]\)", line):
            raise UnsupportedError(f"instruction `{line.strip()}`")  # an access that would be missed
        if m := re.match(r"\s*(?:%[\w.]+ = )?(?:tail |volatile )*(load|store|atomicrmw|cmpxchg) ", line):
            return self.memory_instruction(m[1], line)
        return [self.clean(line)]

    def add_sites(self, *sites: Site) -> int:
        """Number sites of the current instruction; returns the first number."""
        first = len(self.sites)
        self.sites += [replace(s, where=self.where) for s in sites]
        return first

    def inline_ptx(self, line: str) -> str:
        call = r'(.*?call )((?:\{[^}]*\}|<[^>]*>|[\w ])+?) asm (?:sideeffect )?"([^"]*)", "([^"]*)"\('
        m = re.match(call, line)
        if m is None:
            raise UnsupportedError(f"instruction `{line.strip()}`")
        before, ret, template, constraints = m.groups()
        operands = balanced(line[m.end() :])
        after = line[m.end() + len(operands) + 1 :]
        arguments = split_args(self.clean(operands))
        types = tuple(leading_type(a) for a in arguments)
        key = (ret, template, constraints, *types)
        if key not in self.snippets:
            snippet = Instructions(template, constraints, ret, types)
            name = f"ptx_{len(self.snippets)}"
            self.definitions.append(snippet.definition(name))
            for symbol, declaration in snippet.declarations.items():
                self.declare_native(symbol, declaration)
            self.snippets[key] = name, snippet.sites
        name, sites = self.snippets[key]
        arguments.append(f"i32 {self.add_sites(*sites)}")
        return self.clean(f"{before}{ret} @{name}({', '.join(arguments)}){after}")

    def intrinsic_call(self, line: str) -> list[str]:
        before, _, rest = line.partition("@llvm.nvvm.")
        name, _, rest = rest.partition("(")
        operands = balanced(rest)
        after = rest[len(operands) + 1 :]
        if _NO_EFFECT.match(name):
            return []
        arguments = split_args(operands)
        if name in _TAKES_SITE:
            arguments.append(f"i32 {self.add_sites(Site('barrier', name, 1))}")
        elif "matrix.sync" in name:
            kind = "shared_load" if name.startswith("ld") else "shared_store"
            arguments.append(f"i32 {self.add_sites(Site(kind, name, 16))}")
        return [self.clean(f"{before}@{_symbol(name)}({', '.join(arguments)}){after}")]

    def memory_instruction(self, opcode: str, line: str) -> list[str]:
        """Route a plain access to global or shared memory through the runtime."""
        parts = split_args(line)
        plain = opcode in ("load", "store")
        which = 1 if plain else 0  # the part that ends with the pointer
        m = re.search(r"ptr addrspace\(([13])\) ((?:getelementptr|inttoptr) .*|[%@][\w.]+)", parts[which])
        if m is None:
            return [self.clean(line)]  # local memory
        # load T, pointer; store T value, pointer; atomicrmw operation pointer, T value
        typed = re.sub(rf".*?{opcode} (?:volatile |atomic )*", "", parts[0]) if plain else parts[1]
        if typed.startswith("ptr addrspace(3)"):
            raise UnsupportedError(f"pointer to shared memory in memory: `{line.strip()}`")
        ty = leading_type(typed)
        size = bits_of(ty) // 8
        kind = opcode if plain and f"{opcode} atomic" not in line else "atomic"
        space = "global" if m[1] == "1" else "shared"
        operation = re.findall(r"atomicrmw \w+|cmpxchg|load|store", line)[0]
        align = re.search(r", align (\d+)", line)
        site = Site(f"{space}_{kind}", f"{operation} {ty}", int(align[1]) if align else size)
        self.declarations[f"gs_{space}"] = f"declare ptr @gs_{space}(ptr, i32, i32, i32)"
        self.temporaries += 1
        host = f"%gs.{self.temporaries}"
        parts[which] = f"{parts[which][: m.start()]}ptr {host}{parts[which][m.end() :]}"
        check = f"@gs_{space}({self.clean(m[0])}, i32 {size}, i32 {self.add_sites(site)}, i32 1)"
        return [f"  {host} = call ptr {check}", self.clean("  " + ", ".join(parts))]


def _symbol(intrinsic: str) -> str:
    return "nvvm_" + intrinsic.replace(".", "_")


def _without_metadata(line: str) -> str:
    return re.sub(r",? ![\w.]+ !\d+", "", line)


def _source_locations(lines: list[str]) -> Callable[[str], str]:
    """A function from the number of a debug location to "file.py:line" in the kernel itself, outside inlined code."""
    nodes = {m[1]: m[2] for line in lines if (m := re.match(r"!(\d+) = (.*)", line))}

    def field(number: str | None, name: str) -> str | None:
        m = re.search(rf"\b{name}: !?\"?([^,\")]+)", nodes.get(number or "", ""))
        return m[1] if m else None

    def locate(number: str) -> str:
        while outer := field(number, "inlinedAt"):
            number = outer
        scope = field(number, "scope")
        while scope and not field(scope, "file"):
            scope = field(scope, "scope")
        return f"{field(field(scope, 'file'), 'filename') or '?'}:{field(number, 'line')}"

    return locate
