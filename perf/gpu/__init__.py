"""Tools that examine the Triton kernels without a GPU: compile for absent GPUs, inspect the code, run it on a CPU.

| file | what |
|---|---|
| `report.py` | compiles kernels for all targets: spills, accesses, instructions, occupancy |
| `versions.py` | compiles and simulates kernels with several versions of Triton |
| `traffic.py` | counts the bytes that kernels load and store |
| `offline.py` | compiles for a GPU that is not there |
| `code.py` | reads accesses, instructions and loops from compiled code |
| `occupancy.py` | computes how many programs a multiprocessor holds at a time |
| `gpusim/` | runs compiled kernels on a CPU, with checks for races, bounds and barriers |
"""
