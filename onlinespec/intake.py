"""What comes from the server: messages, their rows filed with the requests they belong to."""

import sys

from onlinespec.config import BufferConfig
from onlinespec.errors import WireError
from onlinespec.trainer.assemble import Assembler
from onlinespec.trainer.prefix import PrefixRows
from onlinespec.wire.messages import Rows, SampleMessage
from onlinespec.wire.sockets import SampleReceiver


class Intake:
    """endpoint: the server's."""

    def __init__(self, endpoint: str, config: BufferConfig):
        self.assembler = Assembler(PrefixRows(config.prefix_cache_bytes), config.ttl_s, config.open_bytes)
        self.num_damaged = 0
        """messages that did not decode"""
        self._receiver = SampleReceiver(endpoint)

    def next_message(self, timeout_s: float) -> SampleMessage | None:
        """The next one, its rows already filed; a damaged one is counted and dropped. None where none came."""
        while True:
            try:
                received = self._receiver.receive(timeout_s)
                if received is None:
                    return None
                message, frames = received
                if isinstance(message, Rows):
                    self.assembler.rows(message, frames)
                return message
            except WireError as error:
                self.num_damaged += 1
                print(f"onlinespec sidecar: dropped a message: {error}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._receiver.close()
