"""Arithmetic instructions of inline PTX."""

import re

from .ir import LLVM_TYPE, bits_of
from .ptx import Snippet

# opcode -> operation on integers; {s} stands for s or u, the signedness of the type
INTEGER_OPERATION = {
    "add": "add",
    "sub": "sub",
    "div": "{s}div",
    "rem": "{s}rem",
    "and": "and",
    "or": "or",
    "xor": "xor",
}
FLOAT_OPERATION = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}
OTHER_ROUNDING = {"rz", "rm", "rp", "rs", "rna"}  # every rounding but to nearest even
OTHER_RANGE = {"sat", "satfinite", "relu", "xorsign"}


class Arithmetic(Snippet):
    """Instructions that compute a register from registers."""

    def int_bits(self) -> int:
        """Width of the instruction's type, which must be an integer or a predicate."""
        m = re.fullmatch(r"[bsu](\d+)", self.type)
        if m is None and self.type != "pred":
            raise self.unsupported()
        return int(m[1]) if m else 1

    def sign(self) -> str:
        """The signedness of the type: s or u."""
        return "s" if self.type[0] == "s" else "u"

    def is_float(self) -> bool:
        """Whether the type is a float; its only known form rounds to nearest, without saturation."""
        if self.type in LLVM_TYPE and not (OTHER_ROUNDING | OTHER_RANGE).isdisjoint(self.mods):
            raise self.unsupported()
        return self.type in LLVM_TYPE

    def intrinsic(self, name: str, ty: str, *values: str, flag: str | None = None) -> str:
        """Call an LLVM intrinsic on values of one type; `flag` is a trailing i1."""
        short = {"half": "f16", "bfloat": "bf16", "float": "f32", "double": "f64"}
        m = re.fullmatch(r"<(\d+) x (.*)>", ty)
        mangled = f"v{m[1]}{short[m[2]]}" if m else short.get(ty, ty)
        operands = [f"{ty} {v}" for v in values] + ([f"i1 {flag}"] if flag else [])
        return self.call(ty, f"llvm.{name}.{mangled}", *operands)

    def float_intrinsic(self, name: str, d: str, *operands: str) -> None:
        """Assign the value of an LLVM intrinsic on floating-point operands."""
        values = [self.get_float(o, self.type) for o in operands]
        self.set_float(d, self.intrinsic(name, LLVM_TYPE[self.type], *values), self.type)

    # data movement and logic

    def op_mov(self, d: str, a: str) -> None:
        bits = 1 if self.type == "pred" else self.type_bits(self.type)
        self.set(d, self.get(a, bits), bits)

    def op_selp(self, d: str, a: str, b: str, predicate: str) -> None:
        bits = self.type_bits(self.type)
        x, y = self.get(a, bits), self.get(b, bits)
        self.set(d, self.let(f"select i1 {self.get(predicate, 1)}, i{bits} {x}, i{bits} {y}"), bits)

    def op_setp(self, d: str, a: str, b: str) -> None:
        relation = self.mods[0]
        if len(self.mods) != 2 + ("ftz" in self.mods) or "|" in d:
            raise self.unsupported()
        if self.is_float():  # eq: false if an operand is NaN; equ: true
            predicate, ty = ("u" if len(relation) == 3 else "o") + relation[:2], LLVM_TYPE[self.type]
            x, y = self.get_float(a, self.type), self.get_float(b, self.type)
            result = self.let(f"fcmp {predicate} {ty} {x}, {y}")
        else:
            bits = self.int_bits()
            relation = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(relation, relation)
            predicate = relation if relation in ("eq", "ne") else self.sign() + relation
            result = self.let(f"icmp {predicate} i{bits} {self.get(a, bits)}, {self.get(b, bits)}")
        self.set(d, result, 1)

    def op_not(self, d: str, a: str) -> None:
        bits = self.int_bits()
        self.set(d, self.let(f"xor i{bits} {self.get(a, bits)}, -1"), bits)

    def op_lop3(self, d: str, a: str, b: str, c: str, table: str) -> None:
        inputs, rows, result = [self.get(o, 32) for o in (a, b, c)], int(table, 0), "0"
        for row in range(8):
            if rows >> row & 1:
                term = "-1"
                for k, v in enumerate(inputs):
                    v = v if row >> (2 - k) & 1 else self.let(f"xor i32 {v}, -1")
                    term = self.let(f"and i32 {term}, {v}")
                result = self.let(f"or i32 {result}, {term}")
        self.set(d, result, 32)

    def op_prmt(self, d: str, a: str, b: str, selector: str) -> None:
        if self.mods != ["b32"]:
            raise self.unsupported()
        self.set(d, self.call("i32", "nvvm_prmt", *(f"i32 {self.get(o, 32)}" for o in (a, b, selector))), 32)

    def op_shl(self, d: str, a: str, b: str) -> None:
        self.shift("shl", d, a, b)

    def op_shr(self, d: str, a: str, b: str) -> None:
        self.shift("ashr" if self.sign() == "s" else "lshr", d, a, b)

    def shift(self, operation: str, d: str, a: str, b: str) -> None:
        """PTX clamps the amount at the width; LLVM leaves larger amounts undefined."""
        bits = self.int_bits()
        amount = self.resize(self.get(b, 32), 32, bits)
        inside = self.let(f"icmp ult i{bits} {amount}, {bits}")
        clamped = self.let(f"select i1 {inside}, i{bits} {amount}, i{bits} {bits - 1}")
        v = self.let(f"{operation} i{bits} {self.get(a, bits)}, {clamped}")
        if operation != "ashr":
            v = self.let(f"select i1 {inside}, i{bits} {v}, i{bits} 0")
        self.set(d, v, bits)

    def op_shf(self, d: str, low: str, high: str, amount: str) -> None:
        if "wrap" not in self.mods:
            raise self.unsupported()
        values = [self.get(o, 32) for o in (high, low, amount)]
        self.set(d, self.intrinsic("fshl" if self.mods[0] == "l" else "fshr", "i32", *values), 32)

    def op_bfe(self, d: str, a: str, position: str, length: str) -> None:
        bits, first, n = self.int_bits(), int(position, 0), int(length, 0)  # constant fields only
        if not n or first + n > bits:
            raise self.unsupported()
        v = self.let(f"shl i{bits} {self.get(a, bits)}, {bits - first - n}")
        self.set(d, self.let(f"{'ashr' if self.sign() == 's' else 'lshr'} i{bits} {v}, {bits - n}"), bits)

    def op_popc(self, d: str, a: str) -> None:
        bits = self.int_bits()
        self.set(d, self.resize(self.intrinsic("ctpop", f"i{bits}", self.get(a, bits)), bits, 32), 32)

    def op_clz(self, d: str, a: str) -> None:
        bits = self.int_bits()
        count = self.intrinsic("ctlz", f"i{bits}", self.get(a, bits), flag="false")
        self.set(d, self.resize(count, bits, 32), 32)

    def op_brev(self, d: str, a: str) -> None:
        bits = self.int_bits()
        self.set(d, self.intrinsic("bitreverse", f"i{bits}", self.get(a, bits)), bits)

    # integers and floats

    def binary(self, d: str, a: str, b: str) -> None:
        """An instruction that is one operation in LLVM."""
        if self.is_float():
            x, y = self.get_float(a, self.type), self.get_float(b, self.type)
            operation = FLOAT_OPERATION[self.opcode]
            self.set_float(d, self.let(f"{operation} {LLVM_TYPE[self.type]} {x}, {y}"), self.type)
            return
        if "cc" in self.mods or "sat" in self.mods:
            raise self.unsupported()
        bits = self.int_bits()
        operation = INTEGER_OPERATION[self.opcode].format(s=self.sign())
        self.set(d, self.let(f"{operation} i{bits} {self.get(a, bits)}, {self.get(b, bits)}"), bits)

    op_sub = op_div = op_rem = op_and = op_or = op_xor = binary

    def op_add(self, d: str, a: str, b: str) -> None:
        if "cc" in self.mods:
            self.add_with_carry(d, self.get(a, 32), self.get(b, 32), "0")
        else:
            self.binary(d, a, b)

    def op_addc(self, d: str, a: str, b: str) -> None:
        self.add_with_carry(d, self.get(a, 32), self.get(b, 32), self.regs["CC"])

    def add_with_carry(self, d: str, a: str, b: str, carry: str) -> None:
        """d = a + b + carry of 32 bits; the carry out goes to the register CC."""
        if self.int_bits() != 32:
            raise self.unsupported()
        x, y, z = (self.let(f"zext i32 {v} to i64") for v in (a, b, carry))
        total = self.let(f"add i64 {self.let(f'add i64 {x}, {y}')}, {z}")
        self.set(d, self.let(f"trunc i64 {total} to i32"), 32)
        self.regs["CC"] = self.let(f"trunc i64 {self.let(f'lshr i64 {total}, 32')} to i32")

    def product(self, a: str, b: str) -> tuple[str, int]:
        """The low, high or whole (wide) product of two integers, and its width."""
        if "sat" in self.mods:
            raise self.unsupported()
        bits, extend = self.int_bits(), "sext" if self.sign() == "s" else "zext"
        x, y = (self.let(f"{extend} i{bits} {self.get(o, bits)} to i{2 * bits}") for o in (a, b))
        wide = self.let(f"mul i{2 * bits} {x}, {y}")
        if "wide" in self.mods:
            return wide, 2 * bits
        if "hi" in self.mods:
            wide = self.let(f"lshr i{2 * bits} {wide}, {bits}")
        return self.let(f"trunc i{2 * bits} {wide} to i{bits}"), bits

    def op_mul(self, d: str, a: str, b: str) -> None:
        if self.is_float():
            self.binary(d, a, b)
        else:
            self.set(d, *self.product(a, b))

    def op_mad(self, d: str, a: str, b: str, c: str) -> None:
        if self.is_float():
            self.op_fma(d, a, b, c)
            return
        value, bits = self.product(a, b)
        if "cc" in self.mods:
            self.add_with_carry(d, value, self.get(c, 32), "0")
        else:
            self.set(d, self.let(f"add i{bits} {value}, {self.get(c, bits)}"), bits)

    def op_madc(self, d: str, a: str, b: str, c: str) -> None:
        value, _ = self.product(a, b)
        self.add_with_carry(d, value, self.get(c, 32), self.regs["CC"])

    def op_fma(self, d: str, a: str, b: str, c: str) -> None:
        if not self.is_float():
            raise self.unsupported()
        self.float_intrinsic("fma", d, a, b, c)

    def min_max(self, d: str, a: str, b: str) -> None:
        """Minimum or maximum. LLVM has two intrinsics for floats, which differ in what they do with NaN."""
        if self.is_float():
            self.float_intrinsic(self.opcode + ("imum" if "NaN" in self.mods else "num"), d, a, b)
            return
        bits = self.int_bits()
        value = self.intrinsic(self.sign() + self.opcode, f"i{bits}", self.get(a, bits), self.get(b, bits))
        self.set(d, value, bits)

    op_min = op_max = min_max

    def op_neg(self, d: str, a: str) -> None:
        if self.is_float():
            negative = self.let(f"fneg {LLVM_TYPE[self.type]} {self.get_float(a, self.type)}")
            self.set_float(d, negative, self.type)
            return
        bits = self.int_bits()
        self.set(d, self.let(f"sub i{bits} 0, {self.get(a, bits)}"), bits)

    def op_abs(self, d: str, a: str) -> None:
        if self.is_float():
            self.float_intrinsic("fabs", d, a)
            return
        bits = self.int_bits()
        self.set(d, self.intrinsic("abs", f"i{bits}", self.get(a, bits), flag="false"), bits)

    def unary_float(self, d: str, a: str) -> None:
        """A function of an f32, which the runtime has under the name of the intrinsic."""
        form = self.mods[0]
        known = form == "approx" or (form == "rn" and self.opcode in ("sqrt", "rcp"))
        if self.type != "f32" or not known:
            raise self.unsupported()
        value = self.call("float", f"nvvm_{self.opcode}_{form}_f", f"float {self.get_float(a, 'f32')}")
        self.set_float(d, value, "f32")

    op_ex2 = op_lg2 = op_rcp = op_rsqrt = op_sqrt = op_sin = op_cos = op_tanh = unary_float

    # conversions

    def op_cvt(self, d: str, a: str, b: str | None = None) -> None:
        to, source = self.mods[-2:]
        floats = to in LLVM_TYPE, source in LLVM_TYPE
        for ty in (to, source):
            if ty not in LLVM_TYPE and not re.fullmatch(r"[su](8|16|32|64)", ty):
                raise self.unsupported()
        if not (OTHER_ROUNDING | OTHER_RANGE).isdisjoint(self.mods):
            raise self.unsupported()
        if b is not None:
            self.convert_two(d, a, b, to, source)
        elif floats == (True, True):
            old, new = bits_of(LLVM_TYPE[source]), bits_of(LLVM_TYPE[to])
            if old == new:
                raise self.unsupported()
            operation, x = "fptrunc" if new < old else "fpext", self.get_float(a, source)
            self.set_float(d, self.let(f"{operation} {LLVM_TYPE[source]} {x} to {LLVM_TYPE[to]}"), to)
        elif floats == (True, False):
            bits = self.type_bits(source)
            value = self.let(f"{source[0]}itofp i{bits} {self.get(a, bits)} to {LLVM_TYPE[to]}")
            self.set_float(d, value, to)
        elif floats == (False, True):
            self.float_to_int(d, a, to, source)
        else:
            bits, old = self.type_bits(to), self.type_bits(source)
            self.set(d, self.resize(self.get(a, old), old, bits, signed=source[0] == "s"), bits)

    def convert_two(self, d: str, a: str, b: str, to: str, source: str) -> None:
        """Two f32 packed into one register: the first operand becomes the upper half."""
        if to not in ("f16x2", "bf16x2") or source != "f32":
            raise self.unsupported()
        ty, packed = LLVM_TYPE[to[:-2]], "poison"
        for i, operand in enumerate((b, a)):
            v = self.let(f"fptrunc float {self.get_float(operand, 'f32')} to {ty}")
            packed = self.let(f"insertelement <2 x {ty}> {packed}, {ty} {v}, i32 {i}")
        self.set_float(d, packed, to)

    def float_to_int(self, d: str, a: str, to: str, source: str) -> None:
        """Convert with saturation; NaN becomes zero."""
        rounding = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
        name, ty = next(rounding[m] for m in self.mods if m in rounding), LLVM_TYPE[source]
        rounded = self.intrinsic(name, ty, self.get_float(a, source))
        bits, mangled = self.type_bits(to), {"float": "f32", "double": "f64", "half": "f16"}[ty]
        name = f"llvm.fpto{to[0]}i.sat.i{bits}.{mangled}"
        self.set(d, self.call(f"i{bits}", name, f"{ty} {rounded}"), bits)
