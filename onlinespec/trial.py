"""A published candidate on trial in live traffic: the server alternates it with the incumbent, the canary judges.

Blocks travel with the samples and may be lost, as those may. The server ends a switchback by itself after its last
pair, at any swap and when anything fails, always with the incumbent in service; so a trial that dies with its
process leaves the server as it was.
"""

import secrets

from onlinespec.config import CanaryConfig
from onlinespec.gate.canary import Block, Canary, CanaryVerdict
from onlinespec.wire.messages import Ack, BlockEnded, StartSwitchback, StopSwitchback
from onlinespec.wire.sockets import ControlClient


class Trial:
    """Of one candidate against one incumbent. Times are seconds of any one clock."""

    def __init__(
        self,
        control: ControlClient,
        config: CanaryConfig,
        order: StartSwitchback,
        incumbent: int,
        num_draft_steps: int,
        *,
        is_kv_stable: bool,
        now_s: float,
    ):
        self.version = order.version
        self.canary = Canary(
            config, order.version, incumbent, num_draft_steps, started_s=now_s, is_kv_stable=is_kv_stable
        )
        self._control = control
        self._order = order

    def start(self) -> Ack:
        """Ask the server to alternate. The answer says why not, where it cannot."""
        return self._control.acknowledged(self._order)

    def observe(self, message: BlockEnded, now_s: float) -> CanaryVerdict | None:
        """Take one block; the verdict where it decides. One of another switchback is passed over."""
        if (message.candidate, message.seed) != (self._order.version, self._order.seed):
            return None
        block = Block(
            pair=message.pair,
            version=message.version,
            num_draft_steps=message.num_draft_steps,
            decode_steps=message.num_timed_steps,
            tokens=message.num_tokens,
            request_steps=message.num_requests,
            wall_s=message.wall_us * 1e-6,
            mean_running=message.num_requests / message.num_steps if message.num_steps else 0.0,
        )
        return self.canary.observe(block, now_s=now_s)

    def stop(self) -> Ack:
        """The incumbent alone again; nothing where the server has ended it already."""
        return self._control.acknowledged(StopSwitchback())


def switchback_order(config: CanaryConfig, version: int, path: str, digest: str) -> StartSwitchback:
    """For this candidate, with coins that nobody can foresee."""
    return StartSwitchback(version, path, digest, config.block_steps, config.max_pairs, secrets.randbits(62))
