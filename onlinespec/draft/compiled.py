"""torch.compile as the draft uses it: once for all numbers of rows, and never more than so many times.

What is compiled for again is what torch guards on beside sizes: one row or many, how a step's rows lie in memory, the
first layer or a later one, what is frozen by now. Past the bound torch warns once and runs the function as it is
written, which gives the same, slower (FlexAttention as written also has all its scores in memory).
"""

from collections.abc import Callable
from typing import Any

import torch

MAX_COMPILATIONS = 16
"""of one function, all layers together; torch's own 8 are too few for a draft of several layers that freezes some"""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Source: torch 2.13, torch.compiler.config.recompile_limit; it is the whole process's."""
    torch.compiler.config.recompile_limit = MAX_COMPILATIONS
    return torch.compile(function, dynamic=True)
