"""Takes samples from a running server as the sidecar does, while the test sends requests."""

import time
from collections.abc import Sequence

from onlinespec.bench.client import Answer, Prompt
from onlinespec.draft.sample import Sample
from onlinespec.trainer.assemble import Assembler
from onlinespec.trainer.prefix import PrefixRows
from onlinespec.wire.messages import BlockEnded, RequestEnded, RequestStarted, Rows
from onlinespec.wire.sockets import SampleReceiver
from tests.integration.servers import Server, send

QUIET_S = 2.0


class Capture:
    """The receiving end of one server's samples; `assembler` keeps its prefix rows between calls."""

    def __init__(self, server: Server):
        self.server = server
        self.assembler = Assembler(PrefixRows(64 * 2**20), ttl_s=600, max_open_bytes=2**30)
        self.started: list[RequestStarted] = []
        self.ended: list[RequestEnded] = []
        self.blocks: list[BlockEnded] = []
        self._receiver = SampleReceiver(server.paths.samples_endpoint)

    def drain(self, quiet_s: float = QUIET_S) -> list[Sample]:
        """Everything that comes until nothing but heartbeats did for a while."""
        samples, last_s = [], time.monotonic()
        while time.monotonic() - last_s < quiet_s:
            received = self._receiver.receive(0.1)
            if received is not None and isinstance(received[0], BlockEnded):
                self.blocks.append(received[0])
            if received is None or not isinstance(received[0], RequestStarted | Rows | RequestEnded):
                continue
            last_s = time.monotonic()
            message, frames = received
            if isinstance(message, RequestStarted):
                self.started.append(message)
                self.assembler.start(message)
            elif isinstance(message, Rows):
                self.assembler.rows(message, frames)
            elif isinstance(message, RequestEnded):
                self.ended.append(message)
                sample = self.assembler.end(message)
                samples += [sample] if sample is not None else []
        return samples

    def send(self, asked: Sequence[Prompt], **kwargs) -> tuple[list[Answer], list[Sample]]:
        """Ask, then take what the server's queue held meanwhile; what waited from before is let go."""
        self.drain()
        answers = send(self.server, asked, **kwargs)
        return answers, self.drain()

    def close(self) -> None:
        self._receiver.close()
