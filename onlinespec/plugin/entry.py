"""The plugin's entry point: attaches the hooks, in the scheduler process of a server of ours only.

SGLang calls it in every process it starts. It stays inert without our environment variable, so a machine
where onlinespec is merely installed is not touched, and outside the scheduler, where applying hooks would
import the model executor for nothing.
"""

import inspect
import os

RUN_DIR_VARIABLE = "ONLINESPEC_RUN_DIR"


def register() -> None:
    """Group `sglang.srt.plugins`. Raises: SiteError where SGLang is not as declared (SGLang logs it; then no
    `Hello` comes and `serve` refuses)."""
    if not os.environ.get(RUN_DIR_VARIABLE) or not _is_scheduler():
        return
    from onlinespec.plugin.attach import attach

    attach(os.environ[RUN_DIR_VARIABLE])


def _is_scheduler() -> bool:
    """Source: SGLang 0.5.23 managers/scheduler.py run_scheduler_process calls load_plugins first."""
    return any(frame.function == "run_scheduler_process" for frame in inspect.stack(context=0))
