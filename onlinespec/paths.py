"""Every path of a run directory, spelled once.

A run directory belongs to one server at a time and survives it: the version store and the journal
are what a restart resumes from.
"""

import os
from pathlib import Path


class RunPaths:
    """Paths below one run directory; nothing is created until `create` is called."""

    def __init__(self, root: Path | str):
        self.root = Path(root).absolute()

    @property
    def sockets(self) -> Path:
        return self.root / "sockets"

    @property
    def samples_endpoint(self) -> str:
        return f"ipc://{self.sockets / 'samples'}"

    @property
    def control_endpoint(self) -> str:
        return f"ipc://{self.sockets / 'control'}"

    @property
    def resolved_config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def launch(self) -> Path:
        """What `serve` resolved: model, draft, server address, pids; read by the sidecar and the commands."""
        return self.root / "launch.json"

    @property
    def depths(self) -> Path:
        """Draft depths that SGLang prepares at start, as its --speculative-adaptive-config."""
        return self.root / "depths.json"

    @property
    def serve_lock(self) -> Path:
        """Held for a server's life: one run directory, one server."""
        return self.root / "serve.lock"

    @property
    def versions(self) -> Path:
        return self.root / "versions"

    def version(self, number: int) -> Path:
        return self.versions / f"{number:06d}"

    @property
    def offers(self) -> Path:
        """Drafts that `onlinespec offer` left for the gate; each goes when the sidecar takes it."""
        return self.root / "offers"

    @property
    def journal(self) -> Path:
        """Append-only JSONL of every publish, verdict, swap and rollback."""
        return self.root / "journal.jsonl"

    @property
    def holdout_key(self) -> Path:
        return self.root / "holdout.key"

    @property
    def sidecar_status(self) -> Path:
        """Newest counters of the sidecar, replaced atomically about once a second."""
        return self.root / "sidecar.json"

    @property
    def trainer_state(self) -> Path:
        return self.root / "trainer.pt"

    @property
    def exported_target(self) -> Path:
        """The target's embedding table on its way from the server to the sidecar."""
        return self.root / "target"

    @property
    def record_request(self) -> Path:
        """There while `onlinespec record` wants rows on disk; the sidecar looks once a second."""
        return self.root / "record.json"

    @property
    def log(self) -> Path:
        """Output of `serve` and both its processes, where whoever started it put it there."""
        return self.root / "serve.log"

    @property
    def demo_result(self) -> Path:
        return self.root / "demo.json"

    @property
    def demo_plot(self) -> Path:
        return self.root / "demo.png"

    def create(self) -> None:
        """Make the directory tree, readable by its owner only."""
        for path in (self.root, self.sockets, self.versions):
            path.mkdir(parents=True, exist_ok=True)
            os.chmod(path, 0o700)
