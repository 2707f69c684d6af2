"""The rules of CONTRIBUTING.md that a program can check, on every file that ships."""

import ast
import re
from collections.abc import Callable, Iterator

from tests.support.source import ROOT, Module, modules

MOST_FILE_LINES = 500
MOST_FUNCTION_LINES = 80
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def undocumented(tree: ast.Module) -> list[str]:
    """Public modules, classes, functions and methods without a docstring; overrides and setters have it elsewhere."""
    missing = [] if ast.get_docstring(tree) else ["module"]
    for node in tree.body:
        missing += _undocumented(node, "")
    return missing


def _undocumented(node: ast.AST, prefix: str) -> list[str]:
    if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
        return []
    name = f"{prefix}{node.name}"
    missing = [] if ast.get_docstring(node) or _is_documented_elsewhere(node) else [name]
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            missing += _undocumented(child, f"{name}.")
    return missing


def _is_documented_elsewhere(node: Function | ast.ClassDef) -> bool:
    return any(
        ast.unparse(decorator).rpartition(".")[2] in ("override", "overload", "setter")
        for decorator in node.decorator_list
    )


def unannotated(tree: ast.AST) -> list[str]:
    found = []
    for node in functions(tree):
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        bare = [one.arg for one in every if one and one.annotation is None and one.arg not in ("self", "cls")]
        if bare or node.returns is None:
            found.append(f"{node.name}({', '.join(bare)})")
    return found


def calls_print(tree: ast.AST) -> bool:
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        for node in ast.walk(tree)
    )


def too_broad(tree: ast.AST) -> list[int]:
    """Lines of handlers that catch everything and go on."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and not any(isinstance(child, ast.Raise) for child in ast.walk(node))
    ]


def breaches(rule: Callable[[Module], object]) -> dict[str, object]:
    """What the rule finds, by module; empty when every file keeps it."""
    return {name: found for name, module in modules().items() if (found := rule(module))}


def long_functions(tree: ast.AST) -> dict[str, int]:
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions(tree)}
    return {name: lines for name, lines in lengths.items() if lines > MOST_FUNCTION_LINES}


def test_files_are_short() -> None:
    assert breaches(lambda module: module.lines > MOST_FILE_LINES and module.lines) == {}


def test_functions_are_short() -> None:
    assert breaches(lambda module: long_functions(module.tree)) == {}


def test_public_names_are_documented() -> None:
    assert breaches(lambda module: undocumented(module.tree)) == {}


def test_every_function_is_annotated() -> None:
    assert breaches(lambda module: unannotated(module.tree)) == {}


def test_nothing_prints_but_the_console() -> None:
    assert breaches(lambda module: calls_print(module.tree)) == {}


def test_nothing_is_left_unfinished() -> None:
    assert breaches(lambda module: UNFINISHED.findall(module.path.read_text())) == {}


def test_errors_are_caught_by_type() -> None:
    assert breaches(lambda module: too_broad(module.tree)) == {}


def test_every_folder_with_code_is_a_package() -> None:
    folders = {module.path.parent for module in modules().values()}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_rules_see_a_breach() -> None:
    bad = ast.parse("def run(x):\n    try:\n        print(x)\n    except Exception:\n        pass\n")
    assert undocumented(bad) == ["module", "run"]
    assert unannotated(bad) == ["run(x)"]
    assert calls_print(bad)
    assert too_broad(bad) == [4]
    assert UNFINISHED.search("# TODO: later")
    assert long_functions(ast.parse("def run():\n" + "    pass\n" * MOST_FUNCTION_LINES)) == {"run": 81}
    assert long_functions(ast.parse("def run():\n" + "    pass\n" * (MOST_FUNCTION_LINES - 1))) == {}
