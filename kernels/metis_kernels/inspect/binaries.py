"""The binaries of the shipped configurations with their static figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from metis_kernels.inspect.offline import Arch, CompiledLaunch, compile_launches
from metis_kernels.inspect.shipped import configurations
from metis_kernels.inspect.static import StaticFigures, static_figures


@dataclass(frozen=True, slots=True)
class Binary:
    """A kernel as specialised and compiled for one architecture.

    configurations: those that launch it. grid: of the first launch. parameters: type by name, "= value" for constants,
    "% 16" where the kernel relies on divisibility. compile_seconds: wall time of the compiler, 0.0 from its cache.
    """

    op: str
    configurations: list[str]
    kernel: str
    arch: Arch
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    parameters: dict[str, str]
    compile_seconds: float
    figures: StaticFigures


def shipped_binaries(arch: Arch) -> list[Binary]:
    """Every binary of the shipped configurations, once, in the order of their first launch."""
    found: dict[str, tuple[str, CompiledLaunch, dict[str, None]]] = {}
    for configuration in configurations():
        for launch in compile_launches(configuration.run, arch):
            _, _, names = found.setdefault(launch.key, (configuration.op, launch, {}))
            names[configuration.name] = None
    return [_binary(op, list(names), launch) for op, launch, names in found.values()]


def _binary(op: str, names: list[str], launch: CompiledLaunch) -> Binary:
    parameters = {
        parameter.name: f"= {parameter.value!r}"
        if parameter.type == "constexpr"
        else parameter.type + " % 16" * parameter.divisible_by_16
        for parameter in launch.parameters
    }
    return Binary(
        op=op,
        configurations=names,
        kernel=launch.kernel,
        arch=launch.arch,
        grid=launch.grid,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        parameters=parameters,
        compile_seconds=launch.compile_seconds,
        figures=static_figures(launch),
    )


_COLUMNS = (
    "op | kernel | configurations | sm | warps | registers | spill B, store + load | shared KiB, of | occupancy | limited by "
    "| tensor core | loads 128 / 64 / narrow / bulk | exp2 | instructions"
)


def markdown(binaries: Iterable[Binary]) -> str:
    """The figures as a Markdown table."""
    lines = [f"| {_COLUMNS} |", "|" + " --- |" * len(_COLUMNS.split("|"))]
    for binary in binaries:
        figures = binary.figures
        cells = (
            binary.op,
            f"`{binary.kernel}`",
            "; ".join(binary.configurations),
            binary.arch,
            binary.num_warps,
            figures.registers,
            f"{figures.spill_store_bytes} + {figures.spill_load_bytes}",
            f"{figures.shared_bytes / 1024:.1f}, {figures.shared_limit_bytes >> 10}",
            f"{figures.occupancy:.0%}",
            figures.limited_by,
            figures.tensor_core,
            f"{figures.loads_128} / {figures.loads_64} / {figures.loads_narrow} / {figures.loads_bulk}",
            figures.exp2,
            figures.instructions,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def summary(binaries: Iterable[Binary]) -> str:
    """A Markdown table with one row for the architectures together: what docs/kernels.md shows."""
    rows: dict[tuple[str, ...], list[Binary]] = {}
    for binary in binaries:
        variant = "; ".join(value for value in sorted(binary.parameters.values()) if value.startswith("= "))
        where = binary.configurations[0]
        rows.setdefault((binary.kernel, where, variant), []).append(binary)
    by_arch = [sorted(row, key=lambda binary: binary.arch) for row in rows.values()]
    archs = " / ".join(str(binary.arch) for binary in by_arch[0])
    lines = [
        f"| kernel | first of its configurations | registers, sm {archs} | spills B | shared KiB | occupancy % | MMA "
        "| instructions |",
        "|" + " --- |" * 8,
    ]
    for row in by_arch:
        figures = [binary.figures for binary in row]
        cells = (
            f"`{row[0].kernel}`",
            row[0].configurations[0],
            " / ".join(str(one.registers) for one in figures),
            " / ".join(str(one.spill_store_bytes + one.spill_load_bytes) for one in figures),
            " / ".join(f"{one.shared_bytes / 1024:.3g}" for one in figures),
            " / ".join(f"{100 * one.occupancy:.0f}" for one in figures),
            " / ".join(str(one.tensor_core) for one in figures),
            " / ".join(str(one.instructions) for one in figures),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
