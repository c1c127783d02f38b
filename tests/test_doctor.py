"""The doctor names each site of an SGLang that does not fit, and says so in its exit code."""

import shutil
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from onlinespec.cli import app
from onlinespec.doctor import site_lines
from onlinespec.errors import SiteError
from onlinespec.plugin.sites import installed_sglang, known_versions, load_sites, sglang_root

VERSION = installed_sglang()


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """What the sites of the installed version want of a wheel, unpacked."""
    for file in {site.file for site in load_sites(VERSION)}:
        (tmp_path / "sglang" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sglang_root() / file, tmp_path / "sglang" / file)
    (tmp_path / f"sglang-{VERSION}.dist-info").mkdir()
    return tmp_path


def test_the_installed_sglang_resolves_and_the_exit_code_is_0():
    done = CliRunner().invoke(app, ["doctor", "--sglang"])

    assert done.exit_code == 0
    assert f"the installed SGLang ({VERSION}) against the sites of {VERSION}: all resolve" in done.stdout
    assert all(f"{site.name:<14} resolves" in done.stdout for site in load_sites(VERSION))


def test_an_unpacked_wheel_and_the_wheel_itself_say_the_same(unpacked: Path, tmp_path_factory):
    wheel = tmp_path_factory.mktemp("wheels") / f"sglang-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in unpacked.rglob("*.py"):
            archive.write(path, path.relative_to(unpacked))
        archive.writestr(f"sglang-{VERSION}.dist-info/METADATA", "")

    (head, *lines), is_fine = site_lines(str(unpacked))
    (wheel_head, *wheel_lines), is_wheel_fine = site_lines(str(wheel))

    assert is_fine
    assert is_wheel_fine
    assert lines == wheel_lines
    assert head.startswith(f"{unpacked} ({VERSION})")
    assert wheel_head.startswith(f"{wheel} ({VERSION})")


def test_a_site_that_changed_and_one_that_is_gone_are_named(unpacked: Path):
    sampler = unpacked / "sglang/srt/layers/sampler.py"
    sampler.write_text(sampler.read_text().replace("    def forward(", "    def forward( "))
    (unpacked / "sglang/srt/managers/auxiliary_output.py").unlink()

    done = CliRunner().invoke(app, ["doctor", "--sglang", str(unpacked)])

    assert done.exit_code == 1
    assert "2 of 15 do not resolve" in done.stdout
    assert "sampler        has changed Sampler.forward in srt/layers/sampler.py" in done.stdout
    assert "auxiliary      is missing  append_auxiliary_output" in done.stdout


def test_the_sites_of_another_known_version_can_be_looked_for_in_the_installed_one():
    other = next(version for version in known_versions() if version != VERSION)

    lines, is_fine = site_lines(other)

    assert not is_fine
    assert f"({VERSION}) against the sites of {other}" in lines[0]


def test_a_package_that_does_not_say_its_version_is_held_to_the_newest_known(unpacked: Path):
    (unpacked / f"sglang-{VERSION}.dist-info").rmdir()

    lines, _ = site_lines(str(unpacked))

    assert f"(of an unknown version) against the sites of {known_versions()[-1]}" in lines[0]


def test_a_place_without_sglang_is_refused_with_what_to_give(tmp_path: Path):
    with pytest.raises(SiteError, match="holds no package sglang; give a wheel, the directory"):
        site_lines(str(tmp_path))


def test_without_saying_what_to_look_at_it_is_wrong_usage():
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 2
