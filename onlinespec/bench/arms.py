"""What `bench stream` compares. An arm is a way to serve: with which draft, who trains it, who lets it into service.

On the command line an arm may carry settings of its own: `onlinespec trainer.loss=reverse_kl` is onlinespec with that.
"""

from dataclasses import dataclass
from typing import Literal

from onlinespec.errors import BenchError

SWAP_EVERY_STEPS = 50
"""optimizer steps between two swaps of the recipe"""
# One pass over each request in the order of arrival, all parameters, no memory: a FIFO buffer as large as a batch.
RECIPE = (
    "trainer.loss=kl",
    "trainer.optimizer=adamw",
    "trainer.unroll_steps=7",
    "trainer.batch_requests=4",
    "trainer.passes=1",
    "trainer.new_task_requests=0",
    "trainer.ema_decay=0",
    "trainer.kv_mode=free",
    "buffer.replay_frac=0",
    "buffer.reservoir_samples=0",
)

Gate = Literal["none", "steps", "race"]


@dataclass(frozen=True)
class Arm:
    """One arm. overrides: `section.field=value` on top of the config that the bench was given."""

    name: str
    is_speculating: bool = True
    is_adaptive: bool = False
    """SGLang's own adaptive draft depth; its accept length has no replay"""
    gate: Gate = "none"
    """how a trained draft comes into service: never, every SWAP_EVERY_STEPS, or when it won its race"""
    overrides: tuple[str, ...] = ()

    @property
    def is_training(self) -> bool:
        return self.gate != "none"


_ARMS = (
    Arm("none", is_speculating=False),
    Arm("frozen"),
    Arm("adaptive", is_adaptive=True),
    Arm("recipe", gate="steps", overrides=RECIPE),
    # As many optimizer steps as requests, which is what onlinespec takes of a long stream: more than the recipe's.
    Arm("recipe-steps", gate="steps", overrides=(*RECIPE, "trainer.batch_requests=2", "trainer.passes=2")),
    Arm("onlinespec", gate="race"),
)
ARMS = {arm.name: arm for arm in _ARMS}
REPLAY_ARMS = ("none", "frozen", "recipe", "recipe-steps", "onlinespec")
LIVE_ARMS = ("none", "frozen", "adaptive", "recipe", "onlinespec")


def parse_arm(text: str) -> Arm:
    """`NAME` or `NAME section.field=value ...`. Raises: BenchError naming what was found and the arms there are."""
    name, *overrides = text.split()
    if name not in ARMS:
        raise BenchError(f"arm {name!r}: no such arm; wanted one of {', '.join(ARMS)}")
    arm = ARMS[name]
    if overrides and not arm.is_training:
        raise BenchError(f"arm {text!r}: {name} trains nothing, so it takes no settings; leave them out")
    return Arm(text, arm.is_speculating, arm.is_adaptive, arm.gate, (*arm.overrides, *overrides))
