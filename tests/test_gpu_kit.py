"""What a GPU machine without a network is given: the kit has what its packages require and import."""

import ast
import functools
import importlib.metadata
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HERE = ROOT / "benchmarks" / "gpu"
WHEELS = ROOT / ".venv" / "sglang"
VERSIONS = sorted(path.name for path in (ROOT / "patches").iterdir())


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Their folder is where Python looks first, as when they are run."""
    monkeypatch.syspath_prepend(str(HERE))


def test_a_kit_lacks_what_its_packages_require_and_no_list_names(tmp_path):
    from kit_needs import lacking

    requires = ('Here>=2; sys_platform == "linux"', "there_too<3", "not-there", 'extra-only; extra == "all"')
    for name, requirements in (("here", ()), ("asks", requires)):
        folder = tmp_path / f"{name}-1.dist-info"
        folder.mkdir()
        lines = [f"Name: {name}", "Version: 1", *(f"Requires-Dist: {requirement}" for requirement in requirements)]
        (folder / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines]))

    found = lacking(importlib.metadata.distributions(path=[str(tmp_path)]), {"there-too"})

    assert found == ["asks wants not-there"]


def test_the_kit_and_the_image_hold_what_their_packages_and_we_require():
    from kit_needs import lacking, names_in
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    kit, image, left_out = (names_in(HERE / f"{name}.txt") for name in ("kit-0.5.23", "image", "kit-left-out"))
    packages = {canonicalize_name(package.metadata["Name"]): package for package in importlib.metadata.distributions()}
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]

    found = lacking([packages[name] for name in kit & packages.keys()], kit | image | left_out)

    assert found == []
    assert {canonicalize_name(Requirement(line).name) for line in ours} <= kit | image
    assert left_out.isdisjoint(kit | image)


@pytest.fixture(params=VERSIONS)
def wheel(request) -> zipfile.Path:
    if not WHEELS.is_dir():
        pytest.skip("an environment without `make venv` has no wheels to read")
    (found,) = WHEELS.glob(f"sglang-{request.param}-*.whl")
    return zipfile.Path(found)


@functools.cache
def unguarded_in(wheel: str) -> list[str]:
    from kit_imports import left_out_modules, unguarded

    return unguarded(zipfile.Path(wheel), left_out_modules())


@pytest.fixture
def stand_ins(wheel: zipfile.Path) -> Path:
    return HERE / "stand_ins" / wheel.root.filename.split("sglang-")[-1].partition("-")[0]


def test_what_a_server_imports_on_a_gpu_and_the_kit_leaves_out_has_a_stand_in_and_nothing_else_has(wheel, stand_ins):
    found = unguarded_in(wheel.root.filename)

    names = {path.name for path in stand_ins.iterdir() if not path.name.startswith("_")}
    assert {line.rpartition(" ")[2] for line in found} == names


def test_a_stand_in_has_the_names_that_sglang_wants_of_it(wheel, stand_ins, monkeypatch):
    from kit_imports import Site, statements

    monkeypatch.syspath_prepend(str(stand_ins))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    lines = [line.replace(":", " ").split() for line in unguarded_in(wheel.root.filename)]
    wanted = [
        node
        for module in {line[0] for line in lines}
        for node in statements(ast.parse(Site(wheel).file_of(module).read_text()).body, is_whole=False)
        if [module, str(node.lineno)] in [line[:2] for line in lines]
    ]

    exec(compile(ast.Module(wanted, type_ignores=[]), "imports", "exec"), {})

    assert wanted


SOURCES = {
    "sglang/__init__.py": "",
    "sglang/launch_server.py": "from sglang.srt import used, named\nif is_cuda():\n import gone\nelse:\n import gone_b",
    "sglang/srt/__init__.py": "from sglang.srt.used import named",
    "sglang/srt/named.py": "import gone",
    "sglang/srt/used.py": """
try:
    import gone
except ImportError:
    gone = None
if TYPE_CHECKING or not is_cuda() or envs.SGLANG_USE_MODELSCOPE.get():
    import gone
if is_gone_available():
    import gone
with contextlib.suppress(ImportError):
    import gone
with open("a"):
    import here
def named():
    import gone
class Late:
    from . import late
""",
    "sglang/srt/late.py": "import here, other\nif is_some_day:\n    from gone.deep import name",
    "sglang/srt/speculative/eagle_worker_v2.py": "class Worker:\n    def capture(self):\n        import gone",
    "here/__init__.py": "",
}


def test_an_import_counts_where_it_runs_on_a_gpu_and_nothing_guards_it(tmp_path):
    from kit_imports import unguarded

    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    found = unguarded(tmp_path, {"gone", "gone_b", "here"})

    assert found == [
        "sglang.launch_server:3 imports gone",
        "sglang.srt.late:3 imports gone",
        "sglang.srt.speculative.eagle_worker_v2:3 imports gone",
    ]
