"""What SGLang imports on a CUDA machine before it serves, and a kit has left out.

kit_needs compares what packages require; this reads what their modules import, since a package that is left out for
good reason may still stand in an import that nothing guards: the server then dies of it, and only where there is a
GPU. Read are the statements that run when a module is imported, from the processes of a server on, and those inside
the functions that make CUDA graphs. An import that a `try` guards, or that stands under another device, counts not.

Run: python benchmarks/gpu/kit_imports.py SITE, the kit unpacked. Exits with status 1 where something is lacking.
"""

import ast
import sys
from collections.abc import Iterator
from importlib.abc import Traversable
from pathlib import Path

from kit_needs import HERE, names_in

PACKAGE = "sglang"
FOLLOWED = (PACKAGE, "sgl_kernel", "flashinfer", "xgrammar", "compressed_tensors")
"""whose modules are read; the others want nothing that is left out"""
PROCESSES = (
    "launch_server",
    "srt.entrypoints.http_server",
    "srt.managers.scheduler",
    "srt.managers.detokenizer_manager",
    "srt.layers.attention.triton_backend",
    "srt.layers.attention.flashinfer_backend",
    "srt.models.llama",
    "srt.models.llama_eagle3",
)
"""what SGLang imports by name, or lazily, of a Llama with an EAGLE-3 draft"""
WHOLE = ("srt.speculative.eagle_worker_v2", "srt.speculative.eagle_draft_cuda_graph_runner")
"""modules whose functions run at every start with CUDA graphs"""
MODULES = {
    "cuda-tile": "cuda.tile",
    "flash-attn-4": "flash_attn",
    "humming-kernels": "humming",
    "nccl4py": "nccl",
    "nvidia-cudnn-frontend": "cudnn",
    "nvidia-cutlass-dsl": "cutlass",
    "nvshmem4py-cu13": "nvshmem",
    "quack-kernels": "quack",
    "sgl-deep-ep": "deep_ep",
    "sgl-deep-gemm": "deep_gemm",
    "sgl-flash-mla": "flash_mla",
}
"""left out, and imported under another name"""
HERE_TRUE = ("cuda", "sm90", "flashinfer_available")
OFF = ("enable_jit_deepgemm", "sglang_enable_request_decompression", "sglang_use_modelscope")
"""what checks.py turns off, and what nobody turned on"""
ELSEWHERE = ("hip", "npu", "xpu", "musa", "cpu", "hpu", "mps", "mlx", "amx", "gfx95", "sm100", "sm120", "type_checking")
_CATCHES = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}


def holds(test: ast.expr) -> bool | None:
    """What a condition is on the lent machine, as far as its names say; None where they do not."""
    match test:
        case ast.UnaryOp(op=ast.Not()):
            found = holds(test.operand)
            return None if found is None else not found
        case ast.BoolOp():
            values = [holds(value) for value in test.values]
            decides = isinstance(test.op, ast.Or)
            if decides in values:
                return decides
            return None if None in values else not decides
        case ast.Call(func=ast.Name("get_bool_env_var"), args=[ast.Constant(str(name))]):
            return named(name)
        case ast.Call(func=ast.Attribute(value=ast.Attribute(attr=name), attr="get")):
            return named(name)
        case ast.Call(func=ast.Name(name) | ast.Attribute(attr=name)) | ast.Name(name) | ast.Attribute(attr=name):
            return named(name)
    return None


def named(name: str) -> bool | None:
    words = name.lower().strip("_").removeprefix("is_")
    if words.startswith(HERE_TRUE):
        return True
    return False if words.startswith((*ELSEWHERE, *OFF)) or words.endswith("_available") else None


def guards(node: ast.ExceptHandler | ast.withitem) -> bool:
    """Whether an import that fails goes no further than this handler, or `with suppress(...)`."""
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        return True
    names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    is_handler = isinstance(node, ast.ExceptHandler) or "suppress" in ast.unparse(node.context_expr)
    return is_handler and bool(names & _CATCHES)


def statements(body: list[ast.stmt], is_whole: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run with the body. is_whole: those in its functions too."""
    for node in body:
        match node:
            case ast.Import() | ast.ImportFrom():
                yield node
            case ast.If():
                found = holds(node.test)
                yield from statements([] if found is False else node.body, is_whole)
                yield from statements([] if found is True else node.orelse, is_whole)
            case ast.Try():
                caught = any(map(guards, node.handlers))
                yield from statements([] if caught else node.body, is_whole)
                yield from statements([*node.orelse, *node.finalbody], is_whole)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from statements(node.body if is_whole else [], is_whole)
            case ast.With() if any(map(guards, node.items)):
                continue
            case ast.ClassDef() | ast.With() | ast.For() | ast.While():
                yield from statements(node.body, is_whole)


class Site:
    """Packages unpacked in a folder, or in a wheel."""

    def __init__(self, root: Traversable):
        self._root = root
        self._names: dict[str, set[str]] = {}

    def file_of(self, module: str) -> Traversable | None:
        """Its source; None where it is not here."""
        for name in (*module.split("."), "__init__.py"), (*module.split(".")[:-1], module.split(".")[-1] + ".py"):
            found = self._root.joinpath(*name)
            if found.is_file():
                return found
        return None

    def names_in(self, module: str) -> set[str]:
        """Those that its own statements bind: an import takes them before a module of the same name."""
        if module not in self._names:
            file = self.file_of(module)
            body = ast.parse(file.read_text(encoding="utf-8")).body if file is not None else []
            imports = [alias for node in statements(body, is_whole=False) for alias in node.names]
            defined = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
            self._names[module] = {*defined, *(alias.asname or alias.name for alias in imports)}
        return self._names[module]

    def imports_of(self, module: str, file: Traversable, is_whole: bool) -> Iterator[tuple[int, str]]:
        """Line, and module or name in one."""
        package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        for node in statements(ast.parse(file.read_text(encoding="utf-8")).body, is_whole):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
                continue
            of = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*of, *([node.module] if node.module else [])])
            yield node.lineno, base
            bound = self.names_in(base) if base.partition(".")[0] in FOLLOWED else set()
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names if alias.name not in bound)


def unguarded(root: Traversable, left_out: set[str]) -> list[str]:
    """`file:line imports module`, of modules left out that are not in the site either."""
    site, wanted, found = Site(root), [f"{PACKAGE}.{name}" for name in (*PROCESSES, *WHOLE)], []
    whole = {f"{PACKAGE}.{name}" for name in WHOLE}
    seen: set[str] = set()
    while wanted:
        module = wanted.pop()
        file = site.file_of(module)
        if module in seen or file is None:
            continue
        seen.add(module)
        wanted += [module.rpartition(".")[0]] if "." in module else []
        for line, name in site.imports_of(module, file, module in whole):
            if name.partition(".")[0] in FOLLOWED:
                wanted.append(name)
            else:
                lacking = [other for other in left_out if f"{name}.".startswith(f"{other}.")]
                found += [f"{module}:{line} imports {other}" for other in lacking if site.file_of(other) is None]
    return sorted(set(found))


def left_out_modules() -> set[str]:
    return {MODULES.get(name, name.replace("-", "_")) for name in names_in(HERE / "kit-left-out.txt")}


def main() -> int:
    found = unguarded(Path(sys.argv[1]), left_out_modules())
    for line in found:
        print(f"not in the kit, and nothing guards it: {line}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
