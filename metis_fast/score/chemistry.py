"""Chemical formulas in texts: where the case of letters counts (CO is not Co), and _2 is 2."""

from __future__ import annotations

import re

_SYMBOLS = (  # of the 118 elements
    r"A[cglmrstu]|B[aehikr]?|C[adeflmnorsu]?|D[bsy]|E[rsu]|F[elmr]?|G[ade]|H[efgos]?|I[nr]?|Kr?|L[airuv]|M[cdgnot]"
    r"|N[abdehiop]?|O[gs]?|P[abdmortu]?|R[abefghnu]|S[bcegimnr]?|T[abcehilms]|U|V|W|Xe|Yb?|Z[nr]"
)
_COMPOUND = re.compile(rf"(?=.{{1,40}}$)(?:[(\[]*(?:{_SYMBOLS})\d*(?:[)\]]\d*)*)+(?:\^?\d?[+-])?")
_SUBSCRIPTED = re.compile(r"(?<![\w\\])[A-Z(](?:[A-Za-z0-9()_]|(?<=_)\{\d+\}){0,40}")
_SUBSCRIPT = re.compile(r"_\{?(\d+)\}?")
_CHARGED = re.compile(r"(?<![\w\\])((?:[A-Z][a-z]?){1,4})\^(?=\d?[+-](?!\w))")  # Fe_3^+ is another one than Fe3+


def is_compound(text: str) -> bool:
    """Whether a text may be a chemical formula: symbols of elements, counts, brackets, a charge at the end."""
    return _COMPOUND.fullmatch(text) is not None


def without_subscripts(text: str) -> str:
    """Text with chemical formulas in it on one line: CO_2 is CO2, Fe^3+ is Fe3+; x_1 and x^2 stay."""
    text = _CHARGED.sub(lambda found: found[1] if is_compound(found[1]) else found[0], text)
    if "_" not in text:
        return text
    return _SUBSCRIPTED.sub(lambda found: plain if is_compound(plain := _SUBSCRIPT.sub(r"\1", found[0])) else found[0], text)


def differ(one: str, other: str) -> bool:
    """Whether two texts that differ in case alone may be two formulas: CO and Co, NaOH and NAOH, but not usb and USB."""
    if one == other or not (is_compound(one) or is_compound(other)):
        return False
    if is_compound(one) and is_compound(other):
        return True
    compound, text = (one, other) if is_compound(one) else (other, one)
    return not (compound.isupper() or text.islower() or text.istitle())
