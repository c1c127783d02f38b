"""Learning-rate schedules: a factor of the peak rate for each optimizer step. Pure."""

import math

from onlinespec.config import TrainerConfig


def lr_factor(config: TrainerConfig, step: int) -> float:
    """Share of the peak learning rate at optimizer step `step`, counted from 1.

    A linear warm-up, then constant; or cosine to min_lr_frac at schedule_steps; or wsd, constant until the
    last decay_frac of schedule_steps and then linear to min_lr_frac. Past schedule_steps it stays there.

    Source: cosine, Loshchilov and Hutter 2016, arXiv 1608.03983; wsd (warm-up, stable, decay), Hu et al.
    2024, MiniCPM, arXiv 2404.06395.
    """
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    decay_steps = config.schedule_steps - config.warmup_steps
    if config.schedule == "wsd":
        decay_steps = round(config.schedule_steps * config.decay_frac)
    left = (config.schedule_steps - step) / max(1, decay_steps)
    left = min(1.0, max(0.0, left))
    shape = left if config.schedule == "wsd" else 0.5 * (1 - math.cos(math.pi * left))
    return config.min_lr_frac + (1 - config.min_lr_frac) * shape
