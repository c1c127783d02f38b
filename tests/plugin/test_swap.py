"""What may become the draft's weights: exactly the file that was judged, exactly the names in service."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from onlinespec.draft.header import digest
from onlinespec.errors import SwapError
from onlinespec.plugin.swap import read_version

WEIGHTS = {"fc.weight": torch.arange(6.0).reshape(2, 3), "norm.weight": torch.ones(3), "d2t": torch.arange(2)}
NAMES = frozenset(WEIGHTS)


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., str]:
    """Write a version directory with some tensors changed (None removes one); returns its path."""

    def write(**changes: torch.Tensor | None) -> str:
        tensors = WEIGHTS | {name.replace("__", "."): tensor for name, tensor in changes.items()}
        save_file({name: t for name, t in tensors.items() if t is not None}, tmp_path / "model.safetensors")
        return str(tmp_path)

    return write


def test_a_sound_version_is_read_as_it_was_written(publish):
    path = publish()

    weights = read_version(path, digest(path), NAMES)

    assert weights.keys() == NAMES
    assert all(torch.equal(weights[name], WEIGHTS[name]) for name in NAMES)


def test_a_missing_file_is_refused_by_its_path(tmp_path: Path):
    with pytest.raises(SwapError, match=r"model\.safetensors: No such file or directory; publish the version again"):
        read_version(str(tmp_path), "0" * 64, NAMES)


def test_other_bytes_than_those_judged_are_refused_with_both_digests(publish):
    judged = digest(publish())
    path = publish(norm__weight=torch.zeros(3))

    with pytest.raises(SwapError, match=f"has digest {digest(path)[:12]}, wanted {judged[:12]}; the file is damaged"):
        read_version(path, judged, NAMES)


@pytest.mark.parametrize("num_bytes", [0, 4, 30, -1])
def test_a_truncated_file_is_refused_even_where_its_digest_is_the_one_asked_for(publish, num_bytes: int):
    path = publish()
    file = Path(path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])

    with pytest.raises(SwapError, match=r"model\.safetensors: .*; publish the version again"):
        read_version(path, digest(path), NAMES)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "model.embed_tokens.weight", "midlayer.bias"])
def test_a_tensor_that_the_draft_in_service_has_not_is_refused_by_name(publish, name: str):
    path = publish(**{name: torch.ones(2)})

    with pytest.raises(SwapError, match=rf"has the tensor {name}, .*nothing was swapped"):
        read_version(path, digest(path), NAMES)


def test_a_tensor_that_is_missing_is_refused_by_name(publish):
    path = publish(norm__weight=None)

    with pytest.raises(SwapError, match=r"lacks the tensor norm\.weight; nothing was swapped"):
        read_version(path, digest(path), NAMES)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_by_the_name_of_its_tensor(publish, value: float):
    path = publish(norm__weight=torch.tensor([1.0, value, 1.0]))

    with pytest.raises(SwapError, match=r"norm\.weight has values that are not finite; nothing was swapped"):
        read_version(path, digest(path), NAMES)
