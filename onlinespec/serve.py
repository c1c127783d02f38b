"""Supervisor of the two processes: SGLang's server, and the sidecar that trains beside it.

Order: everything that can be refused without importing SGLang is refused first; the server starts; the
plugin's `Hello` proves that the tap and the swap are attached; only then is the server called ready and the
sidecar started. The sidecar may die at any moment and is started again with back-off; the server's end is
the end, and its status is ours.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onlinespec.cpu.settings as cpu_settings
from onlinespec.config import Config
from onlinespec.errors import StartError, WireError
from onlinespec.launch import Launch, holding, write_launch
from onlinespec.paths import RunPaths
from onlinespec.plugin.entry import RUN_DIR_VARIABLE
from onlinespec.plugin.sites import check_sites, load_sites
from onlinespec.provision import provision_draft, resolve_model
from onlinespec.resolve import dump_config
from onlinespec.support import ServerFlags, capture_refusal, depth_refusal, parse_flags, refuse_unsupported
from onlinespec.versions.journal import Journal, ServerStarted
from onlinespec.wire.messages import GetHello, Hello
from onlinespec.wire.sockets import ControlClient, check_endpoint

_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1
NO_ROOM = (
    "trainer.device is {device}: SGLang takes most of its GPU at start; if that is the trainer's too, give SGLang's"
    " --mem-fraction-static so that room is left (0.7 of an 80 GB GPU for a draft of 0.4 B parameters and answers of"
    " hundreds of tokens; trainer.checkpoint_activations wants less for long ones)"
)
"""trainer, incumbent, parent and candidate in float32: some 32 bytes a parameter of the draft, and activations"""
_BELOW_THE_SERVER = {"CUDA_MPS_CLIENT_PRIORITY": "1"}
"""on a GPU that both share under NVIDIA's multi-process service the sidecar gives way; otherwise it says nothing"""


@dataclass(frozen=True)
class Plan:
    """Everything `serve` resolved: what runs, where, with which words."""

    config: Config
    paths: RunPaths
    launch: Launch
    command: list[str]
    environment: dict[str, str]
    notices: list[str]


def plan(model: str, draft: str, run_dir: Path, config: Config, sglang_flags: Sequence[str]) -> Plan:
    """Check everything and lay out the run directory; starts nothing.

    Raises: OnlinespecError, one sentence, for each way in which this cannot be served.
    """
    flags = parse_flags(sglang_flags)
    refuse_unsupported(flags)
    check_sites()
    paths = RunPaths(run_dir)
    check_endpoint(paths.samples_endpoint)
    host, port = flags.get("--host", "127.0.0.1"), flags.integer("--port", 30000)
    _check_port(host, port)
    target = resolve_model(model)
    paths.create()
    with holding(paths):
        paths.record_request.unlink(missing_ok=True)  # it was another server that was asked to record
        provision = provision_draft(target, draft, paths, flags.integer("--context-length", 0), config.trainer)
        launch = Launch(
            model=str(target),
            draft=str(provision.path),
            version=provision.version,
            target_digest=provision.target_digest,
            host=host,
            port=port,
            num_draft_steps=flags.integer("--speculative-num-steps", 3),
            max_context_tokens=provision.max_context_tokens,
            serve_pid=os.getpid(),
            capture_refused=capture_refusal(flags),
            depth_refused=_depth_refused(config, flags),
        )
        depths = {"1": {"candidate_steps": [0, launch.num_draft_steps]}}  # one entry: for every batch size
        paths.depths.write_text(json.dumps(depths))
        paths.resolved_config.write_text(dump_config(config))
        write_launch(paths, launch)
    notices = [*provision.notices]
    if launch.capture_refused:
        notices.append(f"serving without capture: {launch.capture_refused}")
    elif config.floor.enabled and launch.depth_refused:
        notices.append(f"serving at a fixed draft depth: {launch.depth_refused}")
    if config.trainer.device != "cpu" and "--mem-fraction-static" not in flags.values:
        notices.append(NO_ROOM.format(device=config.trainer.device))
    return Plan(config, paths, launch, _command(launch, flags, paths), _environment(paths, flags), notices)


def _depth_refused(config: Config, flags: ServerFlags) -> str:
    if not config.floor.enabled:
        return "floor.enabled is false"
    return capture_refusal(flags) or depth_refusal(flags)


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OverflowError as error:
            raise StartError(f"--port is {port}, wanted 0 to 65535; choose another --port") from error
        except OSError as error:
            raise StartError(f"{host}:{port}: {error.strerror}; choose another --port") from error


def _command(launch: Launch, flags: ServerFlags, paths: RunPaths) -> list[str]:
    module = "onlinespec.cpu.launch" if cpu_settings.is_needed() else "sglang.launch_server"
    steps = launch.num_draft_steps
    defaults = {
        "--model-path": launch.model,
        "--host": launch.host,
        "--port": str(launch.port),
        "--speculative-algorithm": "EAGLE3",
        "--speculative-draft-model-path": launch.draft,
        "--speculative-num-steps": str(steps),
        "--speculative-eagle-topk": "1",
        "--speculative-num-draft-tokens": str(steps + 1),
    }
    added = [part for name, value in defaults.items() if name not in flags.values for part in (name, value)]
    if not launch.depth_refused:
        added += ["--speculative-adaptive", "--speculative-adaptive-config", str(paths.depths)]
    return [sys.executable, "-m", module, *added, *flags.given]


def _environment(paths: RunPaths, flags: ServerFlags) -> dict[str, str]:
    environment = dict(os.environ)
    if cpu_settings.is_needed():
        environment |= {k: v for k, v in cpu_settings.environment(flags.given).items() if k not in os.environ}
    environment[RUN_DIR_VARIABLE] = str(paths.root)
    plugins = [name for name in environment.get("SGLANG_PLUGINS", "").split(",") if name]
    environment["SGLANG_PLUGINS"] = ",".join(dict.fromkeys([*plugins, "onlinespec"]))
    return environment


def _die_with_parent() -> None:
    """In the child: end when the supervisor does, even by SIGKILL (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _spawn(command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_die_with_parent)


class Supervisor:
    """Runs a plan to its end. `run` returns the exit status."""

    def __init__(self, plan: Plan, say=print):
        self._plan = plan
        self._say = say
        self._config = plan.config.supervisor
        self._stopped_by: int | None = None
        self._server: subprocess.Popen | None = None
        self._sidecar: subprocess.Popen | None = None
        self._sidecar_due_s = 0.0
        self._backoff_s = self._config.restart_backoff_s

    def run(self) -> int:
        """Start, watch, stop. Raises: StartError where the server never became ours."""
        with holding(self._plan.paths):
            return self._run()

    def _run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note_signal)
        for notice in self._plan.notices:
            self._say(f"onlinespec: {notice}")
        self._server = _spawn(self._plan.command, self._plan.environment)
        try:
            hello = self._wait_ready()
            if hello is not None:
                self._say_ready(hello)
                self._watch()
        finally:
            self._stop(self._sidecar)
            self._stop(self._server)
        if self._stopped_by is not None:
            return 0
        status = self._server.returncode
        return status if status >= 0 else 128 - status

    def _note_signal(self, number: int, _frame: object) -> None:
        self._stopped_by = number

    def _wait_ready(self) -> Hello | None:
        """The plugin's Hello once the server answers HTTP; None where it ended or was stopped before.

        Raises: StartError where the server answers and the plugin does not, or neither does in time.
        """
        deadline_s = time.monotonic() + self._config.ready_timeout_s
        control = ControlClient(self._plan.paths.control_endpoint)
        while self._is_up():
            if self._answers_http():
                try:
                    reply = control.request(GetHello(), timeout_s=10.0)
                except WireError as error:
                    raise StartError(
                        "the server is up but the plugin did not attach (no Hello); look for 'onlinespec' or"
                        f" 'Failed to apply hooks' in its log above: {error}"
                    ) from error
                assert isinstance(reply, Hello)
                if missing := [site.name for site in load_sites(reply.sglang_version) if site.name not in reply.sites]:
                    raise StartError(
                        f"SGLang did not attach the hook at site {missing[0]}; its log above says why"
                        " ('Failed to apply hooks')"
                    )
                return reply
            if time.monotonic() > deadline_s:
                raise StartError(
                    f"the server did not become ready within {self._config.ready_timeout_s:.0f} s;"
                    " see its log above, or raise supervisor.ready_timeout_s"
                )
            time.sleep(_POLL_S)
        return None

    def _say_ready(self, hello: Hello) -> None:
        launch = self._plan.launch
        Journal(self._plan.paths).append(ServerStarted(time_s=time.time(), version=hello.version))
        capture = "capturing" if hello.capture else "not capturing"
        self._say(
            f"onlinespec: ready at {launch.base_url}/v1, {capture}, draft version {hello.version},"
            f" {hello.num_draft_steps} draft steps, run directory {self._plan.paths.root}"
        )
        if hello.greedy_verify and hello.capture:
            self._say("onlinespec: on a CPU SGLang verifies greedily whatever a request's temperature")

    def _watch(self) -> None:
        while self._is_up():
            if self._config.sidecar and not self._plan.launch.capture_refused:
                self._keep_sidecar()
            time.sleep(_POLL_S)

    def _keep_sidecar(self) -> None:
        now_s = time.monotonic()
        if self._sidecar is not None and self._sidecar.poll() is None:
            if now_s - self._sidecar_due_s > self._config.restart_backoff_max_s:
                self._backoff_s = self._config.restart_backoff_s
            return
        if self._sidecar is not None:
            status = self._sidecar.returncode
            self._say(f"onlinespec: the sidecar ended with status {status}; again in {self._backoff_s:.0f} s")
            self._sidecar = None
            self._sidecar_due_s = now_s + self._backoff_s
            self._backoff_s = min(2 * self._backoff_s, self._config.restart_backoff_max_s)
        if now_s >= self._sidecar_due_s:
            self._sidecar = _spawn(
                [sys.executable, "-m", "onlinespec.sidecar", str(self._plan.paths.root)],
                {**self._plan.environment, **_BELOW_THE_SERVER},
            )
            self._sidecar_due_s = now_s

    def _is_up(self) -> bool:
        return self._stopped_by is None and self._server is not None and self._server.poll() is None

    def _answers_http(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._plan.launch.base_url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _stop(self, process: subprocess.Popen | None) -> None:
        """SIGTERM, then SIGKILL to its whole group after the configured time."""
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(self._config.stop_timeout_s)
            except subprocess.TimeoutExpired:
                self._say(f"onlinespec: process {process.pid} did not stop, killing it")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
