"""Operator definitions without which torchvision does not import next to a CPU build of torch.

The torchvision wheel of the package index carries an extension built against CUDA torch. Where it does not load,
`import torchvision` (and with it most of transformers' model classes) fails on two `register_fake` calls, since the
operators were never defined. Their schemas alone are enough: nothing on a text model's path calls them.
"""

import importlib.util
from pathlib import Path

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_definitions: list[torch.library.Library] = []  # A Library undoes its definitions when it is collected.


def define_torchvision_ops() -> bool:
    """Define the operators that importing torchvision needs; return False where nothing had to be done.

    Source: torchvision 0.28.0, _meta_registrations.py.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _is_defined() or _loads_extension(Path(spec.origin).parent):
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    _definitions.append(library)
    return True


def _is_defined() -> bool:
    return hasattr(torch.ops.torchvision, "nms")


def _loads_extension(package: Path) -> bool:
    for extension in package.glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            return False
    return _is_defined()
