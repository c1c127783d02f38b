"""Imports run one way, and what must start fast or stay inert never loads torch or SGLang."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import onlinespec

PACKAGE = Path(onlinespec.__file__).parent
HEAVY = {"torch", "sglang", "transformers", "openai", "matplotlib"}

# Package or top-level module -> those of ours that it may import. Order is that of the layers; `__init__` holds the
# version alone, and all may import it.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "paths": set(),
    "courtesy": set(),
    "cpu": set(),
    "config": set(),
    "resolve": {"errors", "config"},
    "explain": {"errors", "config", "resolve"},
    "wire": {"errors"},
    "support": {"errors"},
    "launch": {"errors", "paths"},
    "draft": {"errors"},
    "trainer": {"errors", "config", "wire", "draft"},
    "world": {"cpu", "trainer"},
    "gate": {"errors", "config"},
    "versions": {"errors", "paths", "config"},
    "record": {"errors", "paths", "launch", "draft", "versions"},
    "offline": {"errors", "config", "draft", "trainer", "gate", "versions", "record", "world"},
    "plugin": {"errors", "config", "resolve", "paths", "wire", "launch", "draft"},
    "trial": {"config", "wire", "gate"},
    "watch": {"config", "draft", "gate"},
    "depth": {"errors", "config", "wire", "gate", "versions"},
    "target": {"draft", "wire"},
    "intake": {"errors", "config", "wire", "trainer"},
    "sides": {"config", "draft", "gate"},
    "service": {"errors", "config", "paths", "wire", "launch", "draft", "gate", "versions"},
    "offers": {"errors", "paths", "launch", "draft", "versions"},
    "promote": {"errors", "config", "paths", "wire", "launch", "draft", "gate", "versions"}
    | {"offers", "service", "trial", "watch", "depth"},
    "sidecar": {"errors", "config", "resolve", "paths", "wire", "launch", "draft", "trainer", "gate", "versions"}
    | {"promote", "record", "target", "intake", "sides", "courtesy"},
    "provision": {"errors", "config", "paths", "draft", "versions"},
    "operate": {"errors", "paths", "wire", "launch", "versions"},
    "history": {"paths", "launch", "versions"},
    "serve": {"errors", "config", "resolve", "paths", "wire", "support", "launch", "cpu", "versions", "plugin"}
    | {"provision"},
    "doctor": {"errors", "plugin"},
    "bench": {"errors", "config", "resolve", "paths", "wire", "launch", "cpu", "draft", "trainer", "gate", "versions"}
    | {"record", "watch", "intake", "sides", "provision", "operate", "world", "courtesy"},
    "demo": {"errors", "resolve", "paths", "wire", "launch", "versions", "operate", "bench", "world"},
    "cli": {
        "errors",
        "resolve",
        "explain",
        "draft",
        "provision",
        "serve",
        "operate",
        "offers",
        "history",
        "doctor",
        "bench",
        "demo",
        "record",
        "offline",
    },
}
# Rooms that import SGLang, and their modules that do not and may be imported from outside.
DOORS = {
    "plugin": {"onlinespec.plugin.entry", "onlinespec.plugin.sites"},
    "cpu": {"onlinespec.cpu.settings", "onlinespec.cpu.torchvision_ops"},
}
# Modules with imports inside functions, and what they may import there.
LAZY = {"onlinespec.cli": {"onlinespec", "rich"}, "onlinespec.plugin.entry": {"onlinespec"}}
LAZY["onlinespec.bench.app"] = {"onlinespec", "rich"}
LAZY["onlinespec.provision"] = {"huggingface_hub"}
LAZY["onlinespec.plugin.attach"] = {"sglang"}  # what only one of the supported SGLang versions has
LEAN = (
    "wire.sockets",
    "config",
    "resolve",
    "cli",
    "bench.app",
    "draft.header",
    "support",
    "cpu.settings",
    "plugin.entry",
    "plugin.sites",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of what a piece of code imports; `from a import b` is `a.b` where that is a module of ours."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else str(node.module) for name in full}
    return names


def room(name: str) -> str:
    """`onlinespec.wire.frames` -> `wire`; the package itself is `__init__`."""
    return [*name.split("."), "__init__"][1]


IMPORTS = {name: imported(tree) for name, tree in MODULES.items()}
OURS = {name: {other for other in others if other in MODULES} for name, others in IMPORTS.items()}


def test_each_package_imports_only_those_below_it():
    forbidden = [
        f"{name} imports {other}"
        for name, others in OURS.items()
        for other in sorted(others)
        if room(other) not in MAY_IMPORT[room(name)] | {room(name), "__init__"}
    ]

    assert forbidden == []


def test_the_allowed_graph_names_every_package_and_has_no_cycle():
    order = list(TopologicalSorter(MAY_IMPORT).static_order())

    assert set(order) == {room(name) for name in MODULES}


def test_no_module_imports_itself_through_others():
    order = list(TopologicalSorter(OURS).static_order())

    assert set(order) == set(MODULES)


def test_no_import_is_relative():
    relative = [
        f"{name}:{node.lineno}"
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]

    assert relative == []


def test_only_the_plugin_and_the_cpu_room_import_sglang():
    importers = {name for name, others in IMPORTS.items() if any(other.split(".")[0] == "sglang" for other in others)}

    assert {room(name) for name in importers} <= set(DOORS)
    assert not importers & set().union(*DOORS.values())


def test_outside_the_rooms_of_sglang_only_their_inert_modules_are_imported():
    entered = [
        f"{name} imports {other}"
        for name, others in OURS.items()
        for other in sorted(others)
        if room(other) in DOORS and room(name) != room(other) and other not in DOORS[room(other)]
    ]

    assert entered == []


def test_nothing_is_pickled():
    picklers = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    importers = [name for name, others in IMPORTS.items() if picklers & {other.split(".")[0] for other in others}]

    assert importers == []


def test_imports_stand_at_the_top_except_where_a_heavy_one_must_wait():
    inside = {
        (name, other.split(".")[0])
        for name, tree in MODULES.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for other in imported(function)
    }

    assert inside <= {(name, package) for name, packages in LAZY.items() for package in packages}


def test_what_must_start_fast_loads_no_heavy_package():
    names = [f"onlinespec.{name}" for name in LEAN]
    code = f"import sys, {', '.join(names)}; print(sorted({HEAVY!r} & set(sys.modules)))"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert found.strip() == "[]"


def test_help_loads_no_heavy_package():
    command = [sys.executable, "-X", "importtime", "-m", "onlinespec.cli", "--help"]

    done = subprocess.run(command, capture_output=True, text=True, check=True)

    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "onlinespec.resolve" in loaded
    assert not HEAVY & loaded
    assert "serve" in done.stdout
