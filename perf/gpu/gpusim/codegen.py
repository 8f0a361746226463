"""Compile LLVM IR to an object file with the LLVM inside libtriton.

A program of its own, because LLVM ends the process on errors; it loads nothing else, to start fast:
    python codegen.py LIBTRITON IR_FILE OBJECT_FILE CPU FP_FUSION
"""

import ctypes
import importlib.util
import sys
from pathlib import Path


def main(libtriton: str, source: str, target: str, cpu: str, fp_fusion: str) -> None:
    """Write the object file."""
    spec = importlib.util.spec_from_file_location("libtriton", libtriton)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.llvm.init_targets()  # all, but only those of GPUs since Triton 3.9
    library = ctypes.CDLL(libtriton)
    for part in ("TargetInfo", "Target", "TargetMC", "AsmPrinter"):
        if hasattr(library, f"LLVMInitializeX86{part}"):
            getattr(library, f"LLVMInitializeX86{part}")()
    ir, triple = Path(source).read_text(), "x86_64-unknown-linux-gnu"
    arguments = [ir, triple, cpu, "", [], fp_fusion == "True", True]  # features, flags, fp_fusion, is_object
    try:
        code = module.llvm.translate_to_asm(*arguments, False)  # canonicalize_gep
    except TypeError:  # before Triton 3.8
        code = module.llvm.translate_to_asm(*arguments)
    Path(target).write_bytes(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
