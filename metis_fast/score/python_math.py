"""Formulas in Python's and sympy's spelling as LaTeX, which the math judge compares. Nothing is evaluated.

The python tool prints `sqrt(2)/2`, `-2*pi` or `exp(16) - 1`, and agents answer what it prints.
"""

from __future__ import annotations

import ast
import re

_FUNCTIONS = {
    **{name: rf"\{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "log", "ln", "arcsin")},
    **{"asin": r"\arcsin", "acos": r"\arccos", "atan": r"\arctan", "arccos": r"\arccos", "arctan": r"\arctan", "log": r"\ln"},
}
_NAMES = {"pi": r"\pi", "E": "e", "I": "i", "oo": r"\infty", "inf": r"\infty", "infinity": r"\infty"}
_GREEK = frozenset(("alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "phi", "omega"))
_MATRICES = frozenset(("Matrix", "ImmutableMatrix", "ImmutableDenseMatrix", "array"))
_MARKS = re.compile(r"[*(\[{]|\b(?:pi|E|I|oo)\b")
_MODULE = re.compile(r"\b(?:math|np|numpy|sympy|sp|cmath)\.(?=[a-z])")
_PRODUCT = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)(?=[a-zA-Z(])(?![eE][+-]?\d)")  # 2pi, 3(x + 1)
_MAX_DEPTH = 40
_MAX_NODES = 400


class _NotAFormulaError(Exception):
    """Python that is no formula."""


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | complex):
        raise _NotAFormulaError
    if isinstance(value, complex):
        return f"{value.imag!r} i"
    digits, _, exponent = repr(value).partition("e")
    return f"{digits} \\times 10^{{{int(exponent)}}}" if exponent else digits


def _matrix(node: ast.expr, depth: int) -> str:
    if not isinstance(node, ast.List) or not node.elts:
        raise _NotAFormulaError
    rows = [row.elts if isinstance(row, ast.List) else [row] for row in node.elts]
    if len({len(row) for row in rows}) > 1 or not rows[0]:
        raise _NotAFormulaError
    lines = r" \\ ".join(" & ".join(_latex(one, depth) for one in row) for row in rows)
    return rf"\begin{{pmatrix}}{lines}\end{{pmatrix}}"


def _call(node: ast.Call, depth: int) -> str:
    if not isinstance(node.func, ast.Name) or node.keywords:
        raise _NotAFormulaError
    if node.func.id in _MATRICES and len(node.args) == 1:
        return _matrix(node.args[0], depth)
    name, values = node.func.id, [_latex(one, depth) for one in node.args]
    match name, values:
        case "sqrt", [value]:
            return rf"\sqrt{{{value}}}"
        case "cbrt", [value]:
            return rf"\sqrt[3]{{{value}}}"
        case "exp", [value]:
            return rf"e^{{{value}}}"
        case (("Abs" | "abs"), [value]):
            return rf"\left|{value}\right|"
        case "factorial", [value]:
            return rf"\left({value}\right)!"
        case (("Rational" | "Fraction"), [over, under]):
            return rf"\frac{{{over}}}{{{under}}}"
        case "log", [value, base]:
            return rf"\log_{{{base}}}\left({value}\right)"
        case (("log2" | "log10"), [value]):
            return rf"\log_{{{name[3:]}}}\left({value}\right)"
        case _, [value] if name in _FUNCTIONS:
            return rf"{_FUNCTIONS[name]}\left({value}\right)"
    raise _NotAFormulaError


def _latex(node: ast.expr, depth: int = 0) -> str:
    depth += 1
    if depth > _MAX_DEPTH:
        raise _NotAFormulaError
    match node:
        case ast.Constant(value=value):
            return _number(value)
        case ast.Name(id=name):
            if name in _NAMES or name in _GREEK:
                return _NAMES.get(name, rf"\{name}")
            if len(name) > 1:
                raise _NotAFormulaError
            return name
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=value):
            return rf"{'-' if isinstance(sign, ast.USub) else ''}\left({_latex(value, depth)}\right)"
        case ast.BinOp(left=left, op=ast.Pow() as op, right=ast.Set(elts=[right])) | ast.BinOp(left=left, op=op, right=right):
            one, other = _latex(left, depth), _latex(right, depth)
            match op:
                case ast.Add() | ast.Sub():
                    return rf"{one} {'+' if isinstance(op, ast.Add) else '-'} \left({other}\right)"
                case ast.Mult():
                    return rf"\left({one}\right) \cdot \left({other}\right)"
                case ast.Div():
                    return rf"\frac{{{one}}}{{{other}}}"
                case ast.Pow():
                    return rf"\left({one}\right)^{{{other}}}"
        case ast.Call():
            return _call(node, depth)
        case ast.Tuple(elts=parts):
            listed = ", ".join(_latex(part, depth) for part in parts)
            is_bare = bool(parts) and node.col_offset == parts[0].col_offset  # 1, 2
            return listed if is_bare else f"({listed})"
        case ast.List(elts=parts):
            return rf"[{', '.join(_latex(part, depth) for part in parts)}]"
        case ast.Set(elts=parts):
            return rf"\{{{', '.join(_latex(part, depth) for part in parts)}\}}"
    raise _NotAFormulaError


def as_latex(text: str) -> str | None:
    """The formula as LaTeX; None where it is none of Python's."""
    if "\\" in text or "$" in text or "^{(" in text:  # x^{(2)} is a derivative
        return None
    text = _PRODUCT.sub(r"\1*", _MODULE.sub("", text).replace("^", "**").replace("π", " pi ")).strip()
    if not _MARKS.search(text):
        return None
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what ast.parse documents for text of any kind
        return None
    if sum(1 for _ in ast.walk(tree)) > _MAX_NODES:
        return None
    try:
        return _latex(tree.body)
    except _NotAFormulaError:
        return None
