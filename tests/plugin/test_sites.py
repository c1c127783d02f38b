"""Hook sites: the installed SGLang passes, and any other is refused by the site's name."""

import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from onlinespec.doctor import site_lines
from onlinespec.errors import SiteError
from onlinespec.plugin.sites import check_sites, fingerprint_of, installed_sglang, known_versions, load_sites

VERSION = installed_sglang()
WHEELS = Path(__file__).parents[2] / ".venv" / "sglang"
"""published wheels, as `make venv` lays them down"""
SGLANG = Path(next(iter(find_spec("sglang").submodule_search_locations)))
SOURCE = '''
def before():
    return 1


class Worker:
    """A class."""

    @decorated
    def forward(self, batch):
        return batch

    async def stream(self):
        return None
'''


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the installed SGLang that the sites stand in."""
    root = tmp_path_factory.mktemp("sglang")
    for file in {site.file for site in load_sites(VERSION)}:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SGLANG / file, root / file)
    return root


@pytest.fixture
def edit(original: Path, tmp_path: Path) -> Callable[[str, str, str], Path]:
    """A copy of those files with one place of one file changed."""

    def copy_and_change(file: str, old: str, new: str) -> Path:
        root = shutil.copytree(original, tmp_path / "sglang")
        text = (root / file).read_text()
        assert text.count(old), f"{old!r} is not in {file}"
        (root / file).write_text(text.replace(old, new))
        return root

    return copy_and_change


def test_the_installed_sglang_passes():
    checked = check_sites()

    assert checked == load_sites(VERSION)
    assert {site.hook for site in checked} <= {"before", "after", "around", "none"}
    assert all(site.why for site in checked)


@pytest.mark.parametrize("version", known_versions())
def test_a_target_is_declared_for_each_hook_and_ends_in_its_symbol(version: str):
    for site in load_sites(version):
        module = "sglang." + site.file.removesuffix(".py").replace("/", ".")
        assert site.target == (f"{module}.{site.symbol}" if site.hook != "none" else ""), site.name
        assert re.fullmatch("[0-9a-f]{16}", site.fingerprint), site.name


@pytest.mark.parametrize("version", known_versions())
def test_every_site_of_a_supported_version_is_in_its_published_wheel(version: str):
    if not WHEELS.is_dir():
        pytest.skip("an environment without `make venv` has no wheels; the form of the sites alone is checked")
    wheels = list(WHEELS.glob(f"sglang-{version}-*.whl"))
    assert wheels, f"{WHEELS} has no wheel of sglang {version}; make venv lays it there"

    lines, is_fine = site_lines(str(wheels[0]))

    assert is_fine, "\n".join(lines)
    assert f"({version}) against the sites of {version}: all resolve" in lines[0]


def test_an_unknown_version_is_refused_with_those_that_are_known():
    with pytest.raises(SiteError) as caught:
        check_sites("0.4.9")

    assert str(caught.value).startswith("SGLang 0.4.9 is installed")
    assert all(version in str(caught.value) for version in known_versions())


def test_a_changed_source_is_refused_with_its_site_and_both_fingerprints(edit):
    site = next(site for site in load_sites(VERSION) if site.name == "sampler")
    root = edit(site.file, "class Sampler(", "class Sampler (")
    assert check_sites(VERSION, root), "a change outside the symbol does not count"

    text = (root / site.file).read_text()
    head, _, tail = text.partition("    def forward(")
    (root / site.file).write_text(f"{head}    def forward( {tail}")

    with pytest.raises(SiteError) as caught:
        check_sites(VERSION, root)
    found = fingerprint_of((root / site.file).read_text(), site.symbol)
    message = str(caught.value)
    assert message.startswith("site sampler: Sampler.forward")
    assert f"fingerprint {found}, wanted {site.fingerprint}" in message
    assert f"sglang=={VERSION}" in message


def test_a_symbol_that_is_gone_is_refused_with_its_site_and_file(edit):
    root = edit("srt/speculative/eagle_worker_common.py", "def run_eagle_verify(", "def run_eagle_verify_v3(")

    with pytest.raises(SiteError, match=r"site verify_rows: run_eagle_verify is not in srt/speculative/.* of SGLang"):
        check_sites(VERSION, root)


def test_a_file_that_is_gone_is_refused_with_its_site(original: Path, tmp_path: Path):
    root = shutil.copytree(original, tmp_path / "sglang")
    (root / "srt/managers/auxiliary_output.py").unlink()

    with pytest.raises(SiteError, match=r"site auxiliary: append_auxiliary_output is not in"):
        check_sites(VERSION, root)


def test_a_fingerprint_is_that_of_the_symbol_alone():
    moved = f"import os\n\n\n{SOURCE}".replace("return 1", "return 2")
    changed = SOURCE.replace("return batch", "return  batch")

    assert fingerprint_of(moved, "Worker.forward") == fingerprint_of(SOURCE, "Worker.forward")
    assert fingerprint_of(changed, "Worker.forward") != fingerprint_of(SOURCE, "Worker.forward")
    assert fingerprint_of(changed, "Worker") != fingerprint_of(SOURCE, "Worker")
    assert fingerprint_of(SOURCE, "Worker.stream") is not None


@pytest.mark.parametrize("symbol", ["forward", "Worker.backward", "Worker.forward.inner", "before.forward"])
def test_a_symbol_that_is_not_there_has_no_fingerprint(symbol: str):
    assert fingerprint_of(SOURCE, symbol) is None
