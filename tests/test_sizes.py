"""The package can be read in an afternoon, and has one place where exceptions end."""

import ast
from pathlib import Path

import onlinespec

PACKAGE = Path(onlinespec.__file__).parent
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
DOCUMENTS = {"README.md": 150, "ARCHITECTURE.md": 200}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
BROAD = {"Exception", "BaseException"}


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From `def` to the end; the docstring is not counted, so that explaining costs nothing."""
    first = function.body[0]
    is_docstring = ast.get_docstring(function) is not None
    docstring = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def is_broad(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or bool(BROAD & {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)})


def test_no_file_is_longer_than_400_lines():
    sizes = {name: len(text.splitlines()) for name, text in SOURCES.items()}

    assert {name: size for name, size in sizes.items() if size > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_60_lines():
    sizes = {
        f"{name}:{node.lineno} {node.name}": num_lines(node)
        for name, text in SOURCES.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }

    assert {name: size for name, size in sizes.items() if size > MAX_FUNCTION_LINES} == {}


def test_documents_stay_short():
    found = {name: PACKAGE.parent / name for name in DOCUMENTS if (PACKAGE.parent / name).is_file()}
    sizes = {name: len(path.read_text().splitlines()) for name, path in found.items()}

    assert "README.md" in sizes
    assert {name: size for name, size in sizes.items() if size > DOCUMENTS[name]} == {}


def test_all_exceptions_are_caught_in_one_place_only():
    broad = [
        name
        for name, text in SOURCES.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ExceptHandler) and is_broad(node)
    ]

    assert broad == ["plugin/fuse.py"]
