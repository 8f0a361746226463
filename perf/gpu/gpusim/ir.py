"""What the translators share: sites, and helpers for the text of LLVM IR."""

import re
from dataclasses import dataclass

from .errors import UnsupportedError

SHARED_BASE = 4096  # address of a CTA's first byte of shared memory; the same constant as in runtime.c

# Kinds of sites, in the order of the enumeration in runtime.c
ACCESS_KINDS = ("global_load", "global_store", "global_atomic", "shared_load", "shared_store", "shared_atomic")
KINDS = (*ACCESS_KINDS, "barrier")

# PTX floating-point types in LLVM
LLVM_TYPE = {
    "f16": "half",
    "bf16": "bfloat",
    "f32": "float",
    "f64": "double",
    "f16x2": "<2 x half>",
    "bf16x2": "<2 x bfloat>",
}


@dataclass(frozen=True)
class Site:
    """A static memory access or barrier of a kernel."""

    kind: str  # one of KINDS
    op: str  # the instruction
    align: int  # required alignment of the address in bytes
    where: str = ""  # "file.py:line" of the kernel's source


def split_args(text: str) -> list[str]:
    """The parts of a text between its top-level commas."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "<{([") - (c in ">})]")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()] if text[start:].strip() else parts


def balanced(text: str) -> str:
    """The text up to the parenthesis that closes an already opened one."""
    depth = 1
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[:i]
    raise ValueError(f"unbalanced parentheses: {text}")


def leading_type(operand: str) -> str:
    """The LLVM type at the beginning of an operand such as "i32 %x"."""
    m = re.match(r"<[^>]*>|\{[^}]*\}|\[[^\]]*\]|metadata|\.\.\.|\w+", operand)
    if m is None:
        raise ValueError(f"no type: {operand}")
    return m[0]


def bits_of(ty: str) -> int:
    """Size of a first-class LLVM type in bits.

    Raises:
        UnsupportedError: the type is unknown.
    """
    fixed = {"half": 16, "bfloat": 16, "float": 32, "double": 64, "ptr": 64}
    if ty in fixed:
        return fixed[ty]
    if m := re.fullmatch(r"i(\d+)", ty):
        return int(m[1])
    if m := re.fullmatch(r"[<\[](\d+) x (.*)[>\]]", ty):
        return int(m[1]) * bits_of(m[2].strip())
    if ty.startswith("{"):
        return sum(bits_of(t) for t in split_args(ty.strip("{} ")))
    raise UnsupportedError(f"LLVM type {ty}")
