"""The repository's own Python files and what they import, read by ast: nothing is executed."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("llamapro", "data_tools", "launch")


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name ("llamapro.files.atomic", a package by its own name) and its tree."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def lines(self) -> int:
        return len(self.path.read_text().splitlines())


@dataclass(frozen=True)
class Import:
    """One imported module; `lazy`: inside a function or under TYPE_CHECKING, so not run when the module loads."""

    target: str
    line: int
    lazy: bool


@cache
def modules() -> dict[str, Module]:
    """Every module of the shipped packages by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = Module(name, path, ast.parse(path.read_text(), str(path)))
    return found


def imports(module: Module) -> Iterator[Import]:
    """What a module imports, at any depth; `from a import b` gives a.b where that is a module of ours, else a."""
    package = module.name if module.path.name == "__init__.py" else module.name.rpartition(".")[0]
    yield from _imports(module.tree, package, lazy=False)


def _imports(node: ast.AST, package: str, *, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, lazy)
        elif isinstance(child, ast.ImportFrom):
            yield from _from_import(child, package, lazy)
        else:
            inner = (
                lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _typing_only(child)
            )
            yield from _imports(child, package, lazy=inner)


def _from_import(node: ast.ImportFrom, package: str, lazy: bool) -> Iterator[Import]:
    base = node.module or ""
    if node.level:
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parents, *([node.module] if node.module else [])])
    for alias in node.names:
        full = f"{base}.{alias.name}"
        yield Import(full if full in modules() else base, node.lineno, lazy)


def _typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def loaded_with(name: str) -> set[str]:
    """Every module, ours and foreign, whose import runs when `name` is imported, as far as our own files say."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if (parent := current.rpartition(".")[0]) and parent in modules():
            waiting.append(parent)
        if module := modules().get(current):
            waiting += [found.target for found in imports(module) if not found.lazy]
    return seen
