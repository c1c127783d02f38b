"""Which losses a step adds up, and how one objective gives way to another.

The accept term alone does not learn from nothing, so its share rises from 0. And a draft that was trained
on one loss loses acceptance when another takes over at once (the gradient of the new loss at the old
optimum is not small), so a changed objective rises from the old mix over the same ramp.
"""

from dataclasses import astuple, dataclass

from onlinespec.config import TrainerConfig


@dataclass(frozen=True)
class Mix:
    """Shares of the terms, which sum to 1; hard_frac: how much of the kl teacher is its argmax."""

    kl: float
    reverse_kl: float
    accept: float
    hard_frac: float


def wanted_mix(config: TrainerConfig) -> Mix:
    """What the config asks for once everything is ramped up."""
    rest = 1.0 - config.accept_frac
    is_reverse = config.loss == "reverse_kl"
    return Mix(
        kl=0.0 if is_reverse else rest,
        reverse_kl=rest if is_reverse else 0.0,
        accept=config.accept_frac,
        hard_frac=float(config.loss == "hard"),
    )


class Objective:
    """The mix at every step. `state` is plain: it goes into the trainer's checkpoint."""

    def __init__(self, config: TrainerConfig):
        self._wanted = wanted_mix(config)
        self._ramp_steps = config.accept_ramp_steps
        rest = 1.0 - self._wanted.accept
        is_all_accept = rest == 0.0
        self._from = Mix(
            kl=1.0 if is_all_accept else self._wanted.kl / rest,
            reverse_kl=0.0 if is_all_accept else self._wanted.reverse_kl / rest,
            accept=0.0,
            hard_frac=self._wanted.hard_frac,
        )
        self._since_step = 0

    def at(self, step: int) -> Mix:
        """The mix of the step after `step` applied ones."""
        ramp = min(1.0, (step - self._since_step) / self._ramp_steps) if self._ramp_steps else 1.0
        pairs = zip(astuple(self._from), astuple(self._wanted), strict=True)
        return Mix(*((1 - ramp) * old + ramp * new for old, new in pairs))

    def state(self) -> dict[str, object]:
        return {"from": astuple(self._from), "wanted": astuple(self._wanted), "since_step": self._since_step}

    def load_state(self, state: dict, step: int) -> None:
        """Go on from a checkpoint after `step` applied steps; where it wanted another mix, ramp from there."""
        saved, wanted = Mix(*state["wanted"]), self._wanted
        self._from, self._since_step = Mix(*state["from"]), state["since_step"]
        if saved != wanted:
            self._wanted = saved
            self._from, self._since_step = self.at(step), step
            self._wanted = wanted
