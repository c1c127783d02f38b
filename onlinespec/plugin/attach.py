"""Registers one hook per declared site with SGLang's hook registry."""

from pathlib import Path

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from onlinespec.plugin.runtime import Runtime
from onlinespec.plugin.sites import check_sites


def attach(root: str) -> Runtime:
    """Check every site, then register. Raises: SiteError where one is missing or changed."""
    sites = check_sites()
    runtime = Runtime(Path(root), sites)
    hooks = {
        "forward": runtime.around_forward,
        "sampler": runtime.before_sampler,
        "receiver": runtime.after_pull_raw_reqs,
        "dispatcher": runtime.after_init_request_dispatcher,
        **dict.fromkeys(("disk", "distributed", "tensor", "ipc"), runtime.around_update_weights),
    }
    for site in sites:
        if site.hook != "none":
            HookRegistry.register(site.target, hooks[site.name], HookType(site.hook))
    return runtime
