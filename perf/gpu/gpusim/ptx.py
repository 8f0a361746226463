"""Translate one inline-PTX snippet into an LLVM IR function: reading, registers and operands.

Triton writes memory accesses, and some arithmetic, as `asm "..."` calls whose templates are short straight-line PTX. A
`Snippet` turns one into an `alwaysinline` function with the same operands plus a trailing `i32 %site`. Registers are
kept as integers in SSA form; a guard (`@$3`) becomes a `select`, or a branch around an access.

Instructions are methods named `op_<first part of the opcode>` of the subclasses in ptx_arithmetic.py and
ptx_memory.py. One that has no method, or a form that its method does not know, is an UnsupportedError.
"""

import re
from collections.abc import Iterator

from .errors import UnsupportedError
from .ir import LLVM_TYPE, Site, bits_of, split_args


class Snippet:
    """A PTX snippet with its translation, which the constructor makes.

    Attributes:
        sites: memory accesses and barriers, in the order in which the function numbers them from %site on
        declarations: `declare` lines of the functions that it calls, by their names
    """

    def __init__(self, template: str, constraints: str, ret_type: str, arg_types: tuple[str, ...]) -> None:
        """Translate.

        Args:
            template: the text in quotes in the `asm` call
            constraints: the constraint string of the call
            ret_type: LLVM type that the call returns
            arg_types: LLVM types of its operands

        Raises:
            UnsupportedError: an instruction is unknown.
        """
        text = re.sub(r"\\([0-9A-Fa-f]{2})", lambda m: chr(int(m[1], 16)), template)
        self.template = text.replace("$$", "$")
        self.ret_type, self.arg_types = ret_type, arg_types
        self.sites: list[Site] = []
        self.declarations: dict[str, str] = {}
        self.lines: list[str] = []
        self.count = 0  # temporaries
        self.block = "entry"  # label of the basic block that is being written
        self.regs: dict[str, str] = {}  # name -> SSA integer (or pointer) value
        self.width: dict[str, int] = {}  # name -> bits
        self.pointers: set[str] = set()  # values that are pointers
        # the instruction that is being translated
        self.statement = self.opcode = self.type = ""
        self.mods: list[str] = []
        self.guard: str | None = None

        codes = [c for c in constraints.split(",") if c and c[0] != "~"]
        num_outputs = sum(c[0] == "=" for c in codes)
        if num_outputs < 2:
            self.out_types = [ret_type] * num_outputs
        else:
            self.out_types = split_args(ret_type.strip("{} "))
        for k, ty in enumerate(self.out_types):
            self.width[f"${k}"] = bits_of(ty)
        for k, (code, ty) in enumerate(zip(codes[num_outputs:], arg_types, strict=True)):
            reg = f"${int(code)}" if code.isdigit() else f"${num_outputs + k}"  # a number ties the input to that output
            self.width[reg] = bits_of(ty)
            self.regs[reg] = self.to_int(f"%a{k}", ty)
        for statement in self.statements():
            self.translate(statement)

    def definition(self, name: str) -> str:
        """The IR of the function."""
        values = []
        for k, ty in enumerate(self.out_types):
            value = self.regs.get(f"${k}", "0")
            cast = "inttoptr" if ty == "ptr" else "bitcast"
            bits = bits_of(ty)
            values.append(value if ty == f"i{bits}" else self.let(f"{cast} i{bits} {value} to {ty}"))
        if not values:
            self.emit("ret void")
        elif len(values) == 1:
            self.emit(f"ret {self.ret_type} {values[0]}")
        else:
            aggregate = "poison"
            for k, (ty, value) in enumerate(zip(self.out_types, values, strict=True)):
                aggregate = self.let(f"insertvalue {self.ret_type} {aggregate}, {ty} {value}, {k}")
            self.emit(f"ret {self.ret_type} {aggregate}")
        params = ", ".join([*(f"{ty} %a{i}" for i, ty in enumerate(self.arg_types)), "i32 %site"])
        head = f"define internal {self.ret_type} @{name}({params}) alwaysinline nounwind"
        return "\n".join([f"{head} {{", "entry:", *self.lines, "}"])

    # building IR

    def emit(self, text: str) -> None:
        """Append an instruction."""
        self.lines.append("  " + text)

    def let(self, text: str) -> str:
        """Append an instruction that has a value; returns the value."""
        self.count += 1
        self.emit(f"%t{self.count} = {text}")
        return f"%t{self.count}"

    def declare(self, ret: str, function: str, args: tuple[str, ...]) -> str:
        """Declare a function and write a call of it; each argument is "type value"."""
        types = ", ".join(a.rsplit(" ", 1)[0] for a in args)
        self.declarations[function] = f"declare {ret} @{function}({types})"
        return f"call {ret} @{function}({', '.join(args)})"

    def call(self, ret: str, function: str, *args: str) -> str:
        """The value of a function's call; each argument is "type value"."""
        return self.let(self.declare(ret, function, args))

    def call_void(self, function: str, *args: str) -> None:
        """Call a function that returns nothing."""
        self.emit(self.declare("void", function, args))

    def start_block(self, label: str) -> None:
        """Begin a basic block."""
        self.lines.append(f"{label}:")
        self.block = label

    def to_int(self, value: str, ty: str) -> str:
        """A value as an integer; pointers are left as they are and remembered."""
        if ty == "ptr":
            self.pointers.add(value)
            return value
        bits = bits_of(ty)
        return value if ty == f"i{bits}" else self.let(f"bitcast {ty} {value} to i{bits}")

    def resize(self, value: str, old: int, new: int, signed: bool = False) -> str:
        """Truncate or extend an integer; constants have no width."""
        if old == new or not value.startswith("%"):
            return value
        return self.let(f"{'trunc' if new < old else 'sext' if signed else 'zext'} i{old} {value} to i{new}")

    # reading the template

    def statements(self) -> Iterator[str]:
        """The statements, without comments and the braces of scopes."""
        text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", self.template, flags=re.S)
        while text := text.lstrip(" \t\r\n{};"):
            statement, _, text = text.partition(";")
            yield " ".join(statement.split())

    def translate(self, statement: str) -> None:
        """Translate a declaration of registers or an instruction."""
        self.statement = statement
        if statement.startswith(".reg"):
            _, ty, names = statement.split(None, 2)
            for name in split_args(names):
                self.width[name] = 1 if ty == ".pred" else self.type_bits(ty)
            return
        m = re.fullmatch(r"(?:@(!?)(\S+) )?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)", statement)
        if not m:
            raise self.unsupported()
        negated, guard, self.opcode, mods, operands = m.groups()
        self.guard = self.get(guard, 1) if guard else None
        if negated:
            self.guard = self.let(f"xor i1 {self.guard}, true")
        method = getattr(self, f"op_{self.opcode}", None)
        if method is None:
            raise self.unsupported()
        self.mods = mods.split(".")[1:]
        self.type = self.mods[-1] if self.mods else ""
        try:
            method(*split_args(operands))
        except (TypeError, ValueError, KeyError, IndexError, StopIteration) as e:
            raise self.unsupported() from e  # a form of the instruction that the method does not know

    def unsupported(self) -> UnsupportedError:
        """The exception for the current instruction."""
        return UnsupportedError(f"PTX instruction `{self.statement}`")

    def no_guard(self) -> None:
        """Refuse the current instruction if it has a guard."""
        if self.guard:
            raise self.unsupported()

    @staticmethod
    def type_bits(ty: str) -> int:
        """Width of a PTX type, from the number in its name."""
        m = re.search(r"\d+", ty)
        if m is None:
            raise ValueError(ty)
        return int(m[0])

    # operands

    def get(self, operand: str, bits: int) -> str:
        """An operand as an integer value of `bits` bits."""
        operand = operand.strip()
        if m := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]+)", operand):
            return str(int(m[1], 16))
        if re.fullmatch(r"-?\d+|-?0[xX][0-9A-Fa-f]+", operand):
            return str(int(operand, 0))
        if operand.startswith("{"):  # a vector of registers packed into one value
            parts = split_args(operand.strip("{} "))
            w, packed = bits // len(parts), "0"
            for i, part in enumerate(parts):
                v = self.let(f"zext i{w} {self.get(part, w)} to i{bits}")
                packed = self.let(f"or i{bits} {packed}, {self.let(f'shl i{bits} {v}, {i * w}')}")
            return packed
        if operand in self.regs:
            value = self.regs[operand]
            if value in self.pointers:
                return self.let(f"ptrtoint ptr {value} to i{bits}")
            return self.resize(value, self.width[operand], bits)
        if operand.startswith("%"):  # a special register
            name = "nvvm_read_ptx_sreg_" + operand[1:].replace(".", "_")
            return self.resize(self.call("i32", name), 32, bits)
        raise self.unsupported()

    def get_float(self, operand: str, ptx_type: str) -> str:
        """An operand as a floating-point value."""
        ty = LLVM_TYPE[ptx_type]
        bits = bits_of(ty)
        return self.let(f"bitcast i{bits} {self.get(operand, bits)} to {ty}")

    def get_pointer(self, operand: str) -> str:
        """The address in `[ register + offset ]`."""
        m = re.fullmatch(r"\[\s*(\S+?)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
        if m is None or m[1] not in self.regs:
            raise self.unsupported()
        value, offset = self.regs[m[1]], int(m[2] or "0", 0)
        if value not in self.pointers:
            value = self.let(f"inttoptr i{self.width[m[1]]} {value} to ptr")
        return self.let(f"getelementptr i8, ptr {value}, i64 {offset}") if offset else value

    def set(self, operand: str, value: str, bits: int, signed: bool = False) -> None:
        """Assign to a register, or to the parts of a vector of registers, if the guard holds."""
        if operand.startswith("{"):
            parts = split_args(operand.strip("{} "))
            w = bits // len(parts)
            for i, part in enumerate(parts):
                shifted = self.let(f"lshr i{bits} {value}, {i * w}")
                self.set(part, self.let(f"trunc i{bits} {shifted} to i{w}"), w)
            return
        if operand == "_":
            return
        width = self.width.setdefault(operand, bits)
        value = self.resize(value, bits, width, signed)
        if self.guard and operand in self.regs:
            old = self.get(operand, width)
            value = self.let(f"select i1 {self.guard}, i{width} {value}, i{width} {old}")
        self.regs[operand] = value

    def set_float(self, operand: str, value: str, ptx_type: str) -> None:
        """Assign a floating-point value."""
        ty = LLVM_TYPE[ptx_type]
        self.set(operand, self.let(f"bitcast {ty} {value} to i{bits_of(ty)}"), bits_of(ty))
