"""transformers' model classes, importable beside a torch without CUDA.

transformers imports torchvision, whose own extension does not load there: its operators are declared first.
"""

from onlinespec.cpu.torchvision_ops import define_torchvision_ops

define_torchvision_ops()

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

__all__ = [
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "GenerationConfig",
    "LlamaConfig",
    "LlamaForCausalLM",
    "PreTrainedTokenizerBase",
]
