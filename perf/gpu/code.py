"""Reads the code of a compiled kernel: accesses to global memory by source line, instructions, the main loop.

Accesses come from the PTX of NVIDIA and the assembler text of AMD, with the calls through which they were inlined.
The order in which loads are issued and waited for comes from the machine code: SASS, by nvdisasm, and again AMD's text.
"""

import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton

from efcp.perf.gpu.offline import Compiled

__all__ = ["Access", "Code", "Line", "accesses", "read_code", "source_lines", "stream_lines"]

Line = tuple[str, int]  # name of a source file without its folder, number of a line

ROUNDS = 8  # of a loop that are followed; after so many, the bytes in flight repeat


@dataclass(frozen=True)
class Access:
    """A static access to global memory: a load, a store or a copy to shared memory, but no atomic."""

    kind: str  # load or store
    bits: int  # of a thread
    lines: tuple[Line, ...]  # its own, then those of the calls it was inlined through; empty where not known
    reported: tuple[Line, ...]  # the same from the line tables, which are wrong for inline assembly of several lines

    def streams(self, marked: set[Line]) -> bool:
        """Whether its own line, or one of the calls that led to it, is marked."""
        return not marked.isdisjoint(self.lines)


@dataclass(frozen=True)
class Code:
    """The machine code of a kernel.

    The main loop is the innermost loop with the most bytes of streaming loads. Bytes in flight are the most bytes of
    streaming loads that a thread has outstanding at one time while the main loop repeats. (Without a main loop, the
    code is followed once from begin to end.) A load is outstanding from its issue. On NVIDIA it ends at the first
    instruction that names one of its registers, and a copy to shared memory at the wait for its group. On AMD it ends
    at a wait for vmcnt that includes it. Every lane counts, masked or not.
    """

    instructions: int  # in all, padding left out
    barriers: int  # of a program, static
    loop_instructions: int  # in the main loop; 0 where there is none
    loop_bytes: int  # of a thread, loaded by streaming loads in one round of the main loop
    loop_lines: frozenset[Line]  # where these loads stand
    in_flight: int  # bytes of a thread


def source_lines(kernel: Compiled) -> set[tuple[Path, int]]:
    """The lines that the kernel's code comes from, after compile-time branches, with helpers and calls of them."""
    found = re.findall(r'loc\("([^"\n]+)":(\d+):\d+', kernel.stages["ttgir"].read_text())
    return {(Path(path), int(line)) for path, line in found}


@cache
def stream_lines(path: Path) -> frozenset[int]:
    """Lines of a source file that end with the comment `# stream`: they must move 16 bytes a thread at a time."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return frozenset(number for number, line in enumerate(lines, 1) if re.search(r"\S.*# stream\s*(#.*)?$", line))


def accesses(kernel: Compiled) -> list[Access]:
    """All static accesses to global memory, in the order of the code."""
    if kernel.target.backend == "cuda":
        return list(_ptx_accesses(kernel.stages["ptx"].read_text()))
    code, _ = _parse_amdgcn(kernel.stages["amdgcn"].read_text())
    return [Access(*moved, i.lines, i.lines) for i in code if (moved := _amd_access(i.opcode))]


def read_code(kernel: Compiled, streaming: Sequence[Access]) -> Code:
    """Read the machine code of a kernel.

    Args:
        kernel: a compiled kernel.
        streaming: its accesses that stream; no others count for the main loop and the bytes in flight.

    Raises:
        subprocess.CalledProcessError: nvdisasm cannot read it.
    """
    if kernel.target.backend == "cuda":
        command = [_nvdisasm(), "--print-code", "--print-line-info-inline", str(kernel.stages["cubin"])]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        (code, labels), moved, outstanding, barrier = _parse_sass(text), _sass_access, _outstanding_cuda, "BAR."
    else:
        text = kernel.stages["amdgcn"].read_text()
        (code, labels), moved, outstanding, barrier = _parse_amdgcn(text), _amd_access, _outstanding_amd, "s_barrier"

    lines = {access.reported: access.lines[0] for access in streaming if access.kind == "load" and access.lines}
    loads = [
        access[1] // 8 if i.lines in lines and (access := moved(i.opcode)) and access[0] == "load" else 0 for i in code
    ]
    loop = [(code[n], loads[n]) for n in _main_loop(_successors(code, labels), loads)]
    followed = loop * ROUNDS or zip(code, loads, strict=True)
    return Code(
        instructions=len(code),
        barriers=sum(i.opcode.startswith(barrier) for i in code),
        loop_instructions=len(loop),
        loop_bytes=sum(loaded for _, loaded in loop),
        loop_lines=frozenset(lines[i.lines] for i, loaded in loop if loaded),
        in_flight=max(outstanding(followed), default=0),
    )


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    operands: str
    lines: tuple[Line, ...]
    conditional: bool


Labels = dict[str, int]  # places in the code, by name
_JUMPS = ("BRA", "CALL.REL.NOINC", "s_branch", "s_cbranch")  # kernels call no functions: CALL leaves a loop
_ENDS = ("BRA", "EXIT", "s_branch", "s_endpgm")  # the next instruction in the text does not run after them


def _successors(code: list[_Instruction], labels: Labels) -> list[list[int]]:
    """For each instruction, the numbers of those that may run next."""
    successors = []
    for n, i in enumerate(code):
        following = [n + 1] if (i.conditional or i.opcode not in _ENDS) and n + 1 < len(code) else []
        if i.opcode.startswith(_JUMPS):
            following += [labels[name] for name in re.findall(r"\.L\w+", i.operands) if labels[name] < len(code)]
        successors.append(following)
    return successors


def _main_loop(successors: list[list[int]], loads: list[int]) -> list[int]:
    """Instructions of the innermost loop with the most bytes of loads; none where no loop loads."""
    loops = []
    for end, following in enumerate(successors):
        for start in following:
            if start <= end:
                loop = _between(start, end, successors)
                if any(loads[n] for n in loop):
                    loops.append(loop)
    inner = [loop for loop in loops if not any(other < loop for other in loops)]
    return sorted(max(inner, key=lambda loop: sum(loads[n] for n in loop), default=set()))


def _between(start: int, end: int, successors: list[list[int]]) -> set[int]:
    """Instructions on paths from start to end that stay between the two; none where there is no such path.

    A jump backwards need not close a loop: code that seldom runs, or that two paths share, may stand elsewhere.
    """
    predecessors: dict[int, list[int]] = {}
    reached, left = {start}, [start]
    while left:
        n = left.pop()
        for following in successors[n]:
            if start <= following <= end and n != end:
                predecessors.setdefault(following, []).append(n)
                if following not in reached:
                    reached.add(following)
                    left.append(following)
    loop, left = {end} & reached, [end]
    while left:
        for n in predecessors.get(left.pop(), []):
            if n not in loop:
                loop.add(n)
                left.append(n)
    return loop


# NVIDIA

_LOC = re.compile(r"\s*\.loc\s+(\d+) (\d+) (\d+)(?:, function_name [^,]+, inlined_at (\d+) (\d+) (\d+))?")
_PTX_ACCESS = re.compile(r"\b(ld|st)((?:\.[\w:]+)*)")
_PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared[\w:.]*\.global[^;]*?\][^;]*?\]\s*,\s*(0x[0-9a-f]+|\d+)")


def _ptx_accesses(text: str) -> Iterator[Access]:
    """Yields the accesses in PTX.

    In inline assembly, LLVM numbers the lines one after the other, so that only the first number is right.
    """
    files = {number: Path(path).name for number, path in re.findall(r'\.file\s+(\d+) "([^"]+)"', text)}
    calls: dict[tuple[str, ...], tuple[Line, ...]] = {}  # by file, line, column
    lines: tuple[Line, ...] = ()
    reported: tuple[Line, ...] = ()
    inside = fresh = False  # in inline assembly; and before its first line
    for text_line in text.splitlines():
        if "inline asm" in text_line:
            inside = fresh = "begin inline asm" in text_line
        elif loc := _LOC.match(text_line):
            place, call = loc.groups()[:3], loc.groups()[3:]
            reported = ((files[place[0]], int(place[1])), *(calls.get(call, ()) if call[0] else ()))
            reported = reported if place[1] != "0" else ()
            if fresh or not inside:
                lines = calls[place] = reported
                fresh = False
        elif copy := _PTX_COPY.search(text_line):
            yield Access("load", 8 * int(copy[1], 0), lines, reported)
        elif (found := _PTX_ACCESS.search(text_line)) and ".global" in found[2]:
            vector = re.search(r"\.v(\d)\b", found[2])
            width = int(re.findall(r"\.[bufs](\d+)\b", found[2])[-1]) * (int(vector[1]) if vector else 1)
            yield Access("load" if found[1] == "ld" else "store", width, lines, reported)


@cache
def _nvdisasm() -> str:
    """Path of nvdisasm, which lies beside the cuobjdump that Triton uses."""
    return str(Path(triton.knobs.nvidia.cuobjdump.path).with_name("nvdisasm"))


def _parse_sass(text: str) -> tuple[list[_Instruction], Labels]:
    code: list[_Instruction] = []
    labels: Labels = {}
    lines: tuple[Line, ...] = ()
    more = False  # the next comment continues the chain of calls
    for text_line in text.splitlines():
        if place := re.match(r'\s*//## File "([^"]+)", line (\d+)( inlined at)?', text_line):
            line = (Path(place[1]).name, int(place[2]))
            lines = (*lines, line) if more else (line,)
            more = bool(place[3])
        elif label := re.match(r"(\.L_\w+):", text_line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", text_line):
            conditional = bool(found[1] or re.match(r"!?U?P\d", found[3]))
            code.append(_Instruction(found[2], found[3], lines, conditional))
    while code and code[-1].opcode in ("NOP", "BRA"):  # padding, and the endless loop in front of it
        code.pop()
    return code, labels


def _sass_access(opcode: str) -> tuple[str, int] | None:
    """Kind and bits of an access to global memory."""
    name, *parts = opcode.split(".")
    if name not in ("LDG", "LDGSTS", "STG"):
        return None
    widths = [int(part.lstrip("US")) for part in parts if re.fullmatch(r"[US]?(8|16|64|128|256)", part)]
    return "store" if name == "STG" else "load", widths[-1] if widths else 32


def _outstanding_cuda(code: Iterable[tuple[_Instruction, int]]) -> Iterator[int]:
    """Yields the bytes in flight of a thread after each instruction.

    Args:
        code: instructions, each with the bytes of its streaming load, or 0.
    """
    owner: dict[int, int] = {}  # of a register: the load that will write it
    flying: dict[int, int] = {}  # bytes, by load
    groups = [0]  # bytes of copies to shared memory; the last group is open
    for number, (i, loaded) in enumerate(code):
        for register in re.findall(r"\bR(\d+)", i.operands):
            flying.pop(owner.pop(int(register), -1), None)
        if i.opcode.startswith("LDGSTS"):
            groups[-1] += loaded
        elif loaded:
            first = re.match(r"R(\d+)", i.operands.split(", ")[0])
            if first:
                flying[number] = loaded
                owner.update((int(first[1]) + r, number) for r in range(max(1, loaded // 4)))
        elif i.opcode == "LDGDEPBAR":
            groups.append(0)
        elif i.opcode == "DEPBAR.LE" and (left := re.match(r"SB0, (0x[0-9a-f]+)", i.operands)):
            groups = groups[-1 - int(left[1], 0) :]
        elif i.opcode in _ENDS and not i.conditional:
            owner, flying = {}, {}  # what follows is reached from elsewhere
        yield sum(flying.values()) + sum(groups)


# AMD


def _parse_amdgcn(text: str) -> tuple[list[_Instruction], Labels]:
    code: list[_Instruction] = []
    labels: Labels = {}
    lines: tuple[Line, ...] = ()
    for text_line in text.splitlines():
        if re.match(r"\s+\.loc\s", text_line):
            found = re.findall(r"([^\s:@\[\]]+):(\d+):\d+", text_line.partition(";")[2])
            lines = tuple((name, int(line)) for name, line in found)
        elif label := re.match(r"(\.L\w+):", text_line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)\s*([^;]*)", text_line):
            if instruction[1] not in ("s_nop", "s_code_end"):
                conditional = "cbranch" in instruction[1]
                code.append(_Instruction(instruction[1], instruction[2].strip(), lines, conditional))
        elif ".end_amdhsa_kernel" in text_line:
            break
    return code, labels


def _amd_access(opcode: str) -> tuple[str, int] | None:
    """Kind and bits of an access to global memory."""
    found = re.match(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(dword|[us]?short|[us]?byte)(?:x(\d))?", opcode)
    if not found:
        return None
    bits = next(bits for name, bits in {"dword": 32, "short": 16, "byte": 8}.items() if found[2].endswith(name))
    return found[1], bits * int(found[3] or 1)


def _outstanding_amd(code: Iterable[tuple[_Instruction, int]]) -> Iterator[int]:
    """The same for AMD. Loads, stores and atomics end in order, and a wait says how many may be left."""
    queue: list[int] = []
    for i, loaded in code:
        if re.match(r"(global|buffer|flat|scratch)_(load|store|atomic)", i.opcode):
            queue.append(loaded)
        elif i.opcode == "s_waitcnt" and (left := re.search(r"vmcnt\((\d+)\)", i.operands)):
            queue = queue[max(0, len(queue) - int(left[1])) :]
        elif i.opcode in _ENDS:
            queue = []
        yield sum(queue)
