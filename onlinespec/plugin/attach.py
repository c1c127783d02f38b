"""Registers one hook per declared site with SGLang's hook registry."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from onlinespec.plugin.auxiliary import AuxiliaryCarrier
from onlinespec.plugin.commits import Carrier
from onlinespec.plugin.legacy import LegacyCarrier
from onlinespec.plugin.runtime import Runtime
from onlinespec.plugin.sites import Site, check_sites


def attach(root: str) -> Runtime:
    """Check every site, then register. Raises: SiteError where one is missing or changed."""
    sites = check_sites()
    runtime = Runtime(Path(root), sites, carrier_of(sites))
    hooks = {
        "forward": runtime.around_forward,
        "verify": runtime.after_verify,
        "sampler": runtime.before_sampler,
        "receiver": runtime.after_pull_raw_reqs,
        "dispatcher": runtime.after_init_request_dispatcher,
        **dict.fromkeys(("disk", "distributed", "tensor", "ipc"), runtime.around_update_weights),
        **runtime.carrier.hooks,
    }
    for site in sites:
        if site.hook != "none":
            HookRegistry.register(site.target, hooks[site.name], HookType(site.hook))
    return runtime


def carrier_of(sites: list[Site]) -> Callable[[Callable[..., Any]], Carrier]:
    """The way to the commit that this SGLang has: its auxiliary output, or ours where it has none."""
    if any(site.name == "auxiliary" for site in sites):
        from sglang.srt.managers.auxiliary_output import append_auxiliary_output

        return lambda _guard: AuxiliaryCarrier(append_auxiliary_output)
    return LegacyCarrier
