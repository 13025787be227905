"""What a compiled launch says about itself without running: registers, spills, memory, occupancy limit, instructions.

Static figures: they bound what a GPU can do, and say nothing of time.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

from metis_kernels.inspect.offline import Arch, CompiledLaunch


@dataclass(frozen=True, slots=True)
class _Multiprocessor:
    """Limits of one streaming multiprocessor; bytes, 32-bit registers, tensor-memory columns."""

    registers: int
    shared_bytes: int
    shared_bytes_per_block: int
    warps: int
    blocks: int
    tensor_memory_columns: int


# CUDA C++ Programming Guide, technical specifications per compute capability.
_LIMITS: dict[Arch, _Multiprocessor] = {
    80: _Multiprocessor(65536, 164 << 10, 163 << 10, 64, 32, 0),
    90: _Multiprocessor(65536, 228 << 10, 227 << 10, 64, 32, 0),
    100: _Multiprocessor(65536, 228 << 10, 227 << 10, 64, 32, 512),
}
_SHARED_RESERVED = 1024  # bytes that the driver takes of every block
_SHARED_UNIT = 128  # bytes
_REGISTER_UNIT = 256  # registers of a warp
_PARTITIONS = 4  # of a multiprocessor; a warp's registers come from one of them


@dataclass(frozen=True, slots=True)
class StaticFigures:
    """Figures of one binary on its architecture. Instruction counts are of the code, not of a run: a loop counts once.

    registers, stack_bytes: of a thread.
    spill_store_bytes, spill_load_bytes: of a thread, summed over the instructions that access local memory, as ptxas
        reports them; Triton makes no local arrays.
    shared_bytes, shared_limit_bytes: of a block, and the most that the architecture gives one.
    blocks: resident on a multiprocessor at once, 0 if the launch cannot run; occupancy: its warps of the warps possible.
    limited_by: what allows no more blocks: "registers", "shared memory", "tensor memory", "warps" or "blocks".
    instructions: all but NOP.
    tensor_core: matrix multiply-accumulate instructions of the tensor cores.
    dots, dots_for_tensor_cores: tl.dot in the source after inlining; those whose operands the tensor cores take, that is
        all but float32 with full ("ieee") precision.
    loads_128, loads_64, loads_narrow: loads from global memory by bits a thread (128 and more, 64, fewer), asynchronous
        copies included.
    loads_bulk: tensor-memory-accelerator copies from global memory.
    exp2: MUFU.EX2.
    """

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    shared_limit_bytes: int
    blocks: int
    occupancy: float
    limited_by: str
    instructions: int
    tensor_core: int
    dots: int
    dots_for_tensor_cores: int
    loads_128: int
    loads_64: int
    loads_narrow: int
    loads_bulk: int
    exp2: int


def static_figures(launch: CompiledLaunch) -> StaticFigures:
    """Read the figures out of the binary, with the cuobjdump of Triton's wheel.

    Raises:
        subprocess.CalledProcessError: cuobjdump fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(launch.cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", str(cubin)]
        dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(value) for value in re.findall(r"\b(?:REG|STACK):(\d+)", dump)[:2])
    opcodes = _opcodes(dump)
    blocks, limited_by = _resident_blocks(launch, registers)
    limit = _LIMITS[launch.arch]
    loads = [_access_bits(opcode) for opcode in opcodes if re.match(r"LDG\b|LDGSTS\b", opcode)]
    dots = re.findall(r"\btt\.dot (.*)", launch.ttir)
    return StaticFigures(
        registers=registers,
        stack_bytes=stack,
        spill_store_bytes=sum(_access_bits(opcode) // 8 for opcode in opcodes if re.match(r"STL\b", opcode)),
        spill_load_bytes=sum(_access_bits(opcode) // 8 for opcode in opcodes if re.match(r"LDL\b", opcode)),
        shared_bytes=launch.shared_bytes,
        shared_limit_bytes=limit.shared_bytes_per_block,
        blocks=blocks,
        occupancy=blocks * launch.num_warps / limit.warps,
        limited_by=limited_by,
        instructions=len(opcodes),
        tensor_core=_count(opcodes, r"[A-Z]*MMA\b"),
        dots=len(dots),
        dots_for_tensor_cores=sum("inputPrecision" in dot or "xf32> * " not in dot for dot in dots),
        loads_128=sum(bits >= 128 for bits in loads),
        loads_64=loads.count(64),
        loads_narrow=sum(bits < 64 for bits in loads),
        loads_bulk=_count(opcodes, r"UTMALDG\b|UBLKCP\b"),
        exp2=_count(opcodes, r"MUFU\.EX2"),
    )


def _opcodes(sass: str) -> list[str]:
    """Opcodes with their modifiers, in order, of lines like `/*0080*/ @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;`."""
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    return [opcode for opcode in opcodes if opcode != "NOP"]


def _count(opcodes: list[str], pattern: str) -> int:
    return sum(re.match(pattern, opcode) is not None for opcode in opcodes)


def _access_bits(opcode: str) -> int:
    """Bits that a load or store moves for one thread: 32 unless a modifier says otherwise."""
    width = re.search(r"\.(?:[US](8|16)|(64|128|256))\b", opcode)
    return int(width[1] or width[2]) if width else 32


def _resident_blocks(launch: CompiledLaunch, registers: int) -> tuple[int, str]:
    """Blocks of a multiprocessor at once, and what limits them. A limit, not a measurement."""
    limit = _LIMITS[launch.arch]
    if launch.shared_bytes > limit.shared_bytes_per_block:
        return 0, "shared memory"
    warp_registers = math.ceil(registers * 32 / _REGISTER_UNIT) * _REGISTER_UNIT
    block_shared = math.ceil((launch.shared_bytes + _SHARED_RESERVED) / _SHARED_UNIT) * _SHARED_UNIT
    allowed = {
        "registers": limit.registers // _PARTITIONS // warp_registers * _PARTITIONS // launch.num_warps,
        "shared memory": limit.shared_bytes // block_shared,
        "warps": limit.warps // launch.num_warps,
        "blocks": limit.blocks,
    }
    if launch.tensor_memory_columns:
        allowed["tensor memory"] = limit.tensor_memory_columns // launch.tensor_memory_columns
    limited_by = min(allowed, key=lambda name: allowed[name])
    return allowed[limited_by], limited_by
