"""Which tensors of a draft make what the server keeps of it.

SGLang's draft caches a key and a value for every token it has seen, from the target's captured hidden states
and the token's embedding; a swap does not touch them, and a radix prefix may hand a request the keys and
values of a draft long gone. What makes them is, in a draft of one layer, the tensors below and nothing
else: while those stand still, everything in the cache is exactly what the new draft would have written.
"""

from collections.abc import Iterable
from typing import Literal

from onlinespec.errors import ConfigError

KvMode = Literal["free", "projections", "stable"]
_PROJECTIONS = ("self_attn.k_proj.weight", "self_attn.v_proj.weight")
_INPUTS = ("fc.weight", "input_norm.weight", "midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight")


def frozen_names(names: Iterable[str], mode: KvMode) -> frozenset[str]:
    """The tensors a KV mode freezes, of a checkpoint's names.

    Raises: ConfigError for `stable` with several decoder layers, whose later keys depend on all of the first.
    """
    names = frozenset(names)
    if mode == "free":
        return frozenset()
    frozen = {name for name in names if name.endswith(_PROJECTIONS)}
    if mode == "stable":
        if any(name.startswith("layers.") for name in names):
            raise ConfigError(
                "trainer.kv_mode is stable, which a draft of several decoder layers cannot be: its later layers' keys"
                " depend on all of the first; set projections or free"
            )
        frozen |= {name for name in names if name in _INPUTS or name.startswith("fc_norm.")}
    return frozenset(frozen)
