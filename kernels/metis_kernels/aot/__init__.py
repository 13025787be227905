"""Ahead-of-time compiled Triton kernels: a job of a thousand ranks should not start with a thousand compilations.

    build      compiles the variants of the shipped configurations, and writes the C and assembler sources of the library
    variant    names a variant: what has to agree between a launch and a compiled kernel
    library    the built library, libmetis_aot.so, through ctypes
    lookup     the variant that fits a launch, if the library has it

`metis_kernels._launch` asks `lookup` and falls back on Triton's just-in-time compiler.
"""
