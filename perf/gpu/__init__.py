"""What can be known of the Triton kernels without a GPU: compiled for absent ones, looked into, and run on a CPU.

| file | what |
|---|---|
| `report.py` | compiles kernels for all targets: spills, accesses, instructions, occupancy |
| `traffic.py` | counts what kernels ask of memory |
| `offline.py` | compiling for a GPU that is not there |
| `code.py` | what is in compiled code |
| `occupancy.py` | programs that a multiprocessor holds at a time |
| `gpusim/` | runs compiled kernels on a CPU, with checks for races, bounds and barriers |
"""
