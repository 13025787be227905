"""The page's files as one: ES modules that know each other by their paths become one script, which a page can hold in itself.

A browser loads no module from a file of the disk, and modules inside a page cannot import each other. So each one becomes a
function that returns what it exports, in the order in which they need each other. Only the forms of `import` and `export` that
our modules use are known.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from importlib import resources

_IMPORT = re.compile(r'^import (?:(?P<name>\w+)|\{(?P<names>[^}]*)\}) from "(?P<path>\./[^"]+)";$', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?function (?P<made>\w+)|const (?P<bound>\w+))", re.MULTILINE)
_DEFAULT = re.compile(r"^export \{ (?P<name>\w+) as default \};$", re.MULTILINE)
_LEFT = re.compile(r"^\s*(?:import|export)\b.*$", re.MULTILINE)
_COMMENT = re.compile(r"^/\*.*?\*/", re.MULTILINE | re.DOTALL)
_ENDS_SCRIPT = re.compile(r"</script|<!--", re.IGNORECASE)


UPLOT = "vendor/uplot"


def text_of(name: str) -> str:
    """A file of the page."""
    return resources.files("metis_fast.view").joinpath("static", name).read_text(encoding="utf-8")


def whole_script() -> str:
    """The page's modules as one, with the licence of what is not ours."""
    static = resources.files("metis_fast.view").joinpath("static")
    modules = [item.name for item in static.iterdir() if item.name.endswith(".js")]
    files = {name: text_of(name) for name in (*modules, f"{UPLOT}/uPlot.esm.js")}
    return f"/*\n{text_of(f'{UPLOT}/LICENSE')}*/\n{bundle(files, 'main.js')}"


def bundle(files: Mapping[str, str], main: str) -> str:
    """One module script. files: path -> source, of `main` and all that it imports, directly or not.

    Raises:
        ValueError: a form of import or export that is not known here, a circle, or text that would end a script element.
    """
    order: list[str] = []
    _visit(main, files, order, ())
    names = {path: f"module{number}" for number, path in enumerate(order)}
    script = "".join(_wrapped(path, files[path], names) for path in order)
    if found := _ENDS_SCRIPT.search(script):
        raise ValueError(f"expected no {found.group()} in the page's modules")
    return script


def _visit(path: str, files: Mapping[str, str], order: list[str], above: tuple[str, ...]) -> None:
    if path in above:
        raise ValueError(f"{path} imports itself by way of {above[-1]}")
    for match in _IMPORT.finditer(files[path]):
        _visit(_target(path, match), files, order, (*above, path))
    if path not in order:
        order.append(path)


def _target(path: str, match: re.Match[str]) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), match["path"]))


def _wrapped(path: str, source: str, names: Mapping[str, str]) -> str:
    code = _COMMENT.sub("", source)  # comments stay in the script: one holds a licence
    exported = [match["made"] or match["bound"] for match in _EXPORT.finditer(code)]
    exported += [f"default: {match['name']}" for match in _DEFAULT.finditer(code)]

    def taken(match: re.Match[str]) -> str:
        wanted = f"default: {match['name']}" if match["name"] else match["names"].replace(" as ", ": ").strip()
        return f"const {{ {wanted} }} = {names[_target(path, match)]};"

    body = _DEFAULT.sub("", _EXPORT.sub("", _IMPORT.sub(taken, source)))
    if left := _LEFT.search(body):
        raise ValueError(f"{path}: {left.group().strip()[:80]} is no import or export that can be put into one script")
    return f"const {names[path]} = await (async () => {{\n{body.strip()}\nreturn {{ {', '.join(exported)} }};\n}})();\n"
