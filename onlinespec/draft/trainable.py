"""Which tensors of a draft are trained: those a KV mode leaves free, and of these the adapted ones. No torch.

SGLang's draft caches a key and a value for every token it has seen, from the target's captured hidden states
and the token's embedding; a swap does not touch them, and a radix prefix may hand a request the keys and
values of a draft long gone. What makes them is, in a draft of one layer, the tensors below and nothing
else: while those stand still, everything in the cache is exactly what the new draft would have written.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from onlinespec.errors import ConfigError

KvMode = Literal["auto", "free", "projections", "stable"]
_MATRICES = frozenset(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc", "lm_head"])
_PROJECTIONS = ("self_attn.k_proj.weight", "self_attn.v_proj.weight")
_INPUTS = ("fc.weight", "input_norm.weight", "midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight")


def frozen_names(names: Iterable[str], mode: KvMode) -> frozenset[str]:
    """The tensors a KV mode freezes, of a checkpoint's names; auto those of projections, where it freezes at all.

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


def check_trainable(shapes: Mapping[str, tuple[int, ...]], mode: KvMode, rank: int, targets: Sequence[str]) -> None:
    """Hold `trainer.kv_mode` and the adapters against a draft, by the shapes of its tensors.

    Raises: ConfigError, one sentence, where they do not fit.
    """
    frozen = frozen_names(shapes, mode)
    if rank:
        check_rank(shapes, adapted_names(shapes, targets, frozen), rank)


def adapted_names(shapes: Mapping[str, tuple[int, ...]], targets: Sequence[str], frozen: frozenset[str]) -> list[str]:
    """The weights that get an adapter: matrices whose module has a target's name, less the frozen ones.

    shapes: of a checkpoint's tensors, by name.

    Raises: ConfigError where a target names no matrix of any draft, or every one it names is frozen or not there.
    """
    matrices = {name: name.removesuffix(".weight").rpartition(".")[2] for name in shapes if len(shapes[name]) == 2}
    unknown = sorted(set(targets) - _MATRICES)
    if unknown:
        raise ConfigError(f"trainer.lora_targets names {unknown[0]}, wanted one of {', '.join(sorted(_MATRICES))}")
    names = [name for name, module in matrices.items() if module in targets and name not in frozen]
    if not names:
        raise ConfigError(
            f"trainer.lora_targets is {', '.join(targets)}, none of which this draft has and trainer.kv_mode leaves"
            " free; add q_proj or o_proj"
        )
    return names


def check_rank(shapes: Mapping[str, tuple[int, ...]], names: Sequence[str], rank: int) -> None:
    """Raises: ConfigError where an adapter would have more rank than its matrix."""
    for name in names:
        if rank > min(shapes[name]):
            raise ConfigError(
                f"trainer.lora_rank is {rank}, wanted at most {min(shapes[name])} for {name} {list(shapes[name])};"
                " lower it, or take the matrix out of trainer.lora_targets"
            )
