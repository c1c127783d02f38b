"""The sidecar gives way to the server: as a process, and as a session where Linux groups by it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from onlinespec import courtesy

SCRIPT = """
import os
from pathlib import Path
from onlinespec.courtesy import step_back
step_back()
group = Path("/proc/self/autogroup")
words = group.read_text().split() if group.exists() else []
print(os.nice(0), words[-1] if words else 10)
"""


def test_a_process_in_a_session_of_its_own_lowers_itself_and_its_session_and_not_ours():
    ours = courtesy._AUTOGROUP.read_text() if courtesy._AUTOGROUP.exists() else ""

    told = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, start_new_session=True)

    assert told.stdout.split() == [str(os.nice(0) + 10), "10"], told.stderr
    assert not ours or courtesy._AUTOGROUP.read_text() == ours


class Group:
    """Refuses so many times with an errno, then takes it."""

    def __init__(self, num_refusals: int, number: int):
        self.refusals = [OSError(number, "refused")] * num_refusals
        self.written: list[str] = []

    def exists(self) -> bool:
        return True

    def write_text(self, text: str) -> None:
        if self.refusals:
            raise self.refusals.pop()
        self.written.append(text)


@pytest.mark.parametrize(
    ("num_refusals", "number", "written"),
    [(2, errno.EAGAIN, ["10"]), (9, errno.EAGAIN, []), (1, errno.EPERM, []), (1, errno.EINVAL, [])],
)
def test_a_busy_kernel_is_asked_again_and_one_that_refuses_is_left(monkeypatch, num_refusals, number, written):
    group = Group(num_refusals, number)
    monkeypatch.setattr(courtesy, "_AUTOGROUP", group)
    monkeypatch.setattr(courtesy, "_PAUSE_S", 0.0)
    monkeypatch.setattr(os, "nice", lambda _by: 0)

    courtesy.step_back()

    assert group.written == written


def test_where_linux_does_not_group_by_session_nice_is_all(monkeypatch, tmp_path: Path):
    values: list[int] = []
    monkeypatch.setattr(courtesy, "_AUTOGROUP", tmp_path / "none")
    monkeypatch.setattr(os, "nice", values.append)

    courtesy.step_back()

    assert values == [10]
    assert not (tmp_path / "none").exists()
