"""Instruments for Triton kernels on a machine without a GPU.

    interpreter   bfloat16 as the hardware computes it, in Triton's interpreter
    sanitizer     out-of-bounds lanes and double stores, in the interpreter
    tally         bytes, dot FLOPs and exponentials of a launch, counted in the interpreter
    offline       what real host code would launch, compiled for a GPU that is not there
    static        registers, spills, shared memory and machine instructions of what was compiled

None of them measures time: what they give are counts and static figures. The first three need TRITON_INTERPRET=1, the
last two need it unset, both from before triton is imported. `python -m metis_kernels.inspect` prints the static figures
of the kernels of this package.
"""
