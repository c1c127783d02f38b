"""The supervisor against a stand-in server that speaks the real wire; the real one is in tests/integration."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from onlinespec.config import Config, SupervisorConfig
from onlinespec.errors import StartError
from onlinespec.launch import Launch, holding
from onlinespec.paths import RunPaths
from onlinespec.plugin.sites import installed_sglang, load_sites
from onlinespec.serve import Plan, Supervisor
from onlinespec.versions.journal import Journal, ServerStarted
from tests.integration.servers import free_port

STAND_IN = """
import sys, threading, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from onlinespec.wire.messages import Hello
from onlinespec.wire.sockets import ControlServer

endpoint, port, sites, seconds, status = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(","), *map(int, sys.argv[4:])
hello = Hello("{version}", sites, 8, 4, 3, 3, True, False, "no", 7, [])

class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): ...

ControlServer(endpoint, lambda request: hello)
server = HTTPServer(("127.0.0.1", port), Health)
threading.Thread(target=server.serve_forever, daemon=True).start()
time.sleep(seconds)
sys.exit(status)
""".replace("{version}", installed_sglang())
SITES = [site.name for site in load_sites(installed_sglang())]


@pytest.fixture(autouse=True)
def handlers_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def plan(root: Path, sites: list[str], seconds: int, status: int) -> Plan:
    paths, port = RunPaths(root), free_port()
    paths.create()
    words = [paths.control_endpoint, str(port), ",".join(sites), str(seconds), str(status)]
    launch = Launch("m", "d", 7, "t", "127.0.0.1", port, 3, 64, os.getpid())
    config = Config(supervisor=SupervisorConfig(sidecar=False, ready_timeout_s=60))
    return Plan(config, paths, launch, [sys.executable, "-c", STAND_IN, *words], dict(os.environ), ["a notice"])


def test_a_site_that_sglang_did_not_attach_is_named_and_the_server_is_stopped(tmp_path):
    supervisor = Supervisor(plan(tmp_path, [name for name in SITES if name != "sampler"], 60, 0), say=lambda _: None)
    began_s = time.monotonic()

    with pytest.raises(StartError, match="did not attach the hook at site sampler"):
        supervisor.run()

    assert time.monotonic() - began_s < 40


def test_the_exit_status_is_the_servers_and_ready_is_said_and_written_down(tmp_path):
    said: list[str] = []

    status = Supervisor(plan(tmp_path, SITES, 6, 3), say=said.append).run()

    assert status == 3
    assert said[0] == "onlinespec: a notice"
    assert "draft version 7" in said[1]
    assert [type(event) for event in Journal(RunPaths(tmp_path)).read()] == [ServerStarted]


def test_a_server_that_ends_before_it_is_ready_ends_serve_with_its_status(tmp_path):
    resolved = plan(tmp_path, SITES, 0, 5)

    assert Supervisor(resolved, say=lambda _: None).run() == 5


def test_sigterm_stops_the_server_and_exits_with_zero(tmp_path):
    said = threading.Event()
    timer = threading.Thread(target=lambda: (said.wait(40), os.kill(os.getpid(), signal.SIGTERM)))
    timer.start()
    supervisor = Supervisor(plan(tmp_path, SITES, 60, 0), say=lambda line: said.set() if "ready" in line else None)

    status = supervisor.run()
    timer.join()

    assert status == 0
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, check=False).stdout == b""


def test_a_run_directory_serves_one_server_at_a_time(tmp_path):
    paths = RunPaths(tmp_path)

    with (
        holding(paths),
        pytest.raises(StartError, match=f"of a running server .process {os.getpid()}."),
        holding(paths),
    ):
        pass

    with holding(paths):
        assert paths.serve_lock.read_text() == str(os.getpid())
