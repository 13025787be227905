"""Triton's interpreter with bfloat16 as the hardware computes it, and with observers of every access.

Upstream keeps bfloat16 in uint16 arrays and computes on the bit patterns; it is documented as not supported
(https://github.com/triton-lang/triton/issues/11584). Kernels for training live on bfloat16, so this module replaces the
interpreter's builder by a subclass. Each override names the defect that it is for, and
tests/kernels/test_inspect_interpreter.py fails as soon as upstream no longer has it.

What the interpreter stays more exact in than a GPU: a float32 dot is not rounded to TF32, and programs run one after
another, so races do not show.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton import knobs
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

Access = Literal["load", "store", "atomic"]
Program = tuple[int, int, int]


class Observer:
    """Sees what interpreted kernels do. Every method here does nothing; one that raises ends the launch."""

    def launch(self, kernel: str, arguments: Sequence[object]) -> None:
        """A launch begins. arguments: as given, tensors on the host."""

    def access(self, kind: Access, program: Program, addresses: NDArray[np.uint64], num_bytes: int) -> None:
        """Memory is about to be accessed. addresses: [lanes], of the lanes that are not masked off, `num_bytes` each."""

    def dot(self, flops: int) -> None:
        """A `tl.dot` of 2 M N K operations, padding of the tile included."""

    def exponential(self, count: int) -> None:
        """`count` lanes of exp or exp2."""


class ObservedError(Exception):
    """An observer's verdict on a kernel; reaches the launching code as it is, not inside Triton's InterpreterError."""


@contextlib.contextmanager
def honest_bf16() -> Iterator[None]:
    """Inside, interpreted kernels compute bfloat16 as a GPU does.

    Operations take float32 values of their operands and round once, to nearest even; a dot multiplies exactly and
    accumulates in float32 (numpy's order of summation). Reductions and scans of bfloat16 raise: a GPU rounds at every step,
    in an order of its own, and a kernel should reduce in float32. In any dtype, numpy's warnings of infinities and NaN are off.

    Raises:
        ValueError: kernels are not interpreted in this process (TRITON_INTERPRET=1 from before triton is imported).
    """
    if not knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET: expected 1 from before triton is imported, got a process that compiles kernels")
    previous = interpreter.interpreter_builder, interpreter.GridExecutor, interpreter.ReduceOps, interpreter.ScanOps
    _install(_builder, _GridExecutor, _ReduceOps, _ScanOps)
    try:
        yield
    finally:
        _install(*previous)


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Inside, `observer` sees the launches of interpreted kernels, and bfloat16 is honest.

    Raises:
        ValueError: see `honest_bf16`.
    """
    with honest_bf16():
        _builder.observers.append(observer)
        try:
            yield
        finally:
            _builder.observers.remove(observer)


def _install(
    builder: InterpreterBuilder, executor: type[GridExecutor], reduce_ops: type[ReduceOps], scan_ops: type[ScanOps]
) -> None:
    # Modules look these names up at every launch; `interpreter_semantic` holds the builder that tl functions use.
    interpreter.interpreter_builder = builder
    interpreter.interpreter_semantic.builder = builder
    interpreter.GridExecutor = executor
    interpreter.ReduceOps = reduce_ops
    interpreter.ScanOps = scan_ops


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    """bfloat16 to float32, exactly; others as they are."""
    if not _is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)


def _round(values: NDArray[Any]) -> TensorHandle:
    """To bfloat16, to nearest even."""
    # a copy: torch warns of read-only arrays, which broadcasting makes
    rounded = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
    return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)


class HonestBuilder(InterpreterBuilder):
    """The interpreter's operations, with bfloat16 done right and every access shown to `observers`."""

    def __init__(self) -> None:
        super().__init__()
        self.observers: list[Observer] = []

    # Upstream multiplies the bit patterns (triton#11584).
    def create_dot(
        self, a: TensorHandle, b: TensorHandle, d: TensorHandle, input_precision: Any, max_num_imprecise_acc: Any
    ) -> TensorHandle:
        *batch, m, k = a.data.shape
        for observer in self.observers:
            observer.dot(2 * int(np.prod(batch)) * m * k * b.data.shape[-1])
        out = super().create_dot(_widen(a), _widen(b), _widen(d), input_precision, max_num_imprecise_acc)
        return _round(out.data) if _is_bf16(d) else out

    # Upstream adds, compares and takes the maximum of bit patterns.
    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., Any]) -> TensorHandle:
        if not _is_bf16(lhs):
            return super().binary_op(lhs, rhs, op)
        out = op(_widen(lhs).data, _widen(rhs).data)
        return TensorHandle(out, tl.int1) if out.dtype == np.bool_ else _round(out)

    # The same for negation and the like.
    def unary_op(self, arg: TensorHandle, op: Callable[..., Any]) -> TensorHandle:
        if op in (np.exp, np.exp2):
            for observer in self.observers:
                observer.exponential(arg.data.size)
        if not _is_bf16(arg):
            return super().unary_op(arg, op)
        return _round(op(_widen(arg).data))

    # The same for a clamp that keeps NaN. A select moves bits, and may.
    def ternary_op(self, lhs: TensorHandle, rhs: TensorHandle, other: TensorHandle, op: Callable[..., Any]) -> TensorHandle:
        if op is np.where or not _is_bf16(other):
            return super().ternary_op(lhs, rhs, other, op)
        return _round(op(_widen(lhs).data, _widen(rhs).data, _widen(other).data))

    # The same for fused multiply-add.
    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        out = super().create_fma(_widen(x), _widen(y), _widen(z))
        return _round(out.data) if _is_bf16(z) else out

    # Upstream truncates float32, and takes the bit pattern for the value where the other type is not float32.
    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if dst_type.scalar == tl.bfloat16:
            return src if _is_bf16(src) else _round(src.data)
        return super().cast_impl(_widen(src), dst_type)

    # The same: a cast with a rounding mode comes here. Upstream rounds halves away from zero.
    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        wide = (tl.float16, tl.float32, tl.float64)
        widens = _is_bf16(src) and dst_type.scalar in wide
        rounds = src.dtype.scalar in wide and dst_type.scalar == tl.bfloat16 and rounding_mode != ir.ROUNDING_MODE.RTZ
        if widens or rounds:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def create_masked_load(
        self, ptrs: TensorHandle, mask: TensorHandle, other: TensorHandle | None, cache_policy: Any, is_volatile: bool
    ) -> TensorHandle:
        self._show("load", ptrs, mask.data)
        return super().create_masked_load(ptrs, mask, other, cache_policy, is_volatile)

    def create_masked_store(self, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, cache_policy: Any) -> None:
        self._show("store", ptrs, mask.data)
        super().create_masked_store(ptrs, value, mask, cache_policy)

    def create_atomic_rmw(
        self, rmwOp: Any, ptr: TensorHandle, val: TensorHandle, mask: TensorHandle, sem: Any, scope: Any
    ) -> TensorHandle:
        self._show("atomic", ptr, mask.data)
        return super().create_atomic_rmw(rmwOp, ptr, val, mask, sem, scope)

    def create_atomic_cas(self, ptr: TensorHandle, cmp: TensorHandle, val: TensorHandle, sem: Any, scope: Any) -> TensorHandle:
        self._show("atomic", ptr, np.True_)
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def _show(self, kind: Access, ptrs: TensorHandle, mask: NDArray[np.bool_] | np.bool_) -> None:
        if not self.observers:
            return
        addresses, active = np.broadcast_arrays(ptrs.data, mask)
        num_bytes = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)  # a bool takes a byte
        for observer in self.observers:
            observer.access(kind, self.grid_idx, addresses[active], num_bytes)


def _refuse_bf16(inputs: Any) -> None:
    if any(value.dtype == tl.bfloat16 for value in inputs):
        raise TypeError("reduction or scan of bfloat16: a GPU rounds at every step, in its own order; convert to float32 first")


# Upstream sums, and takes the maximum of, bit patterns.
class _ReduceOps(ReduceOps):
    def apply_impl(self, input: Any) -> Any:
        _refuse_bf16(input)
        return super().apply_impl(input)


class _ScanOps(ScanOps):
    def apply_impl(self, input: Any) -> Any:
        _refuse_bf16(input)
        return super().apply_impl(input)


class _GridExecutor(GridExecutor):
    """One launch, shown to the observers."""

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        for observer in _builder.observers:
            observer.launch(self.fn.__name__, [*args, *kwargs.values()])
        return args, kwargs

    def __call__(self, *args_dev: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                # numpy warns of infinities and NaN, a GPU computes them in silence
                warnings.simplefilter("ignore", RuntimeWarning)
                super().__call__(*args_dev, **kwargs)
        except InterpreterError as error:
            cause: BaseException | None = error
            while isinstance(cause, InterpreterError):  # one for the kernel, one for every function that it calls
                cause = cause.__cause__
            if isinstance(cause, ObservedError):
                raise cause from None
            raise


_builder = HonestBuilder()
