"""What may become the draft's weights: exactly the file that was judged, exactly the names in service."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from onlinespec.draft.header import digest
from onlinespec.errors import SwapError
from onlinespec.plugin.swap import ApplyVersion, StageVersion, Swapper, read_version

WEIGHTS = {"fc.weight": torch.arange(6.0).reshape(2, 3), "norm.weight": torch.ones(3), "d2t": torch.arange(2)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}


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

    weights = read_version(path, digest(path), SHAPES, {})

    assert weights.keys() == SHAPES.keys()
    assert all(torch.equal(weights[name], WEIGHTS[name]) for name in SHAPES)


def test_a_missing_file_is_refused_by_its_path(tmp_path: Path):
    with pytest.raises(SwapError, match=r"model\.safetensors: No such file or directory; publish the version again"):
        read_version(str(tmp_path), "0" * 64, SHAPES, {})


def test_other_bytes_than_those_judged_are_refused_with_both_digests(publish):
    judged = digest(publish())
    path = publish(norm__weight=torch.zeros(3))

    with pytest.raises(SwapError, match=f"has digest {digest(path)[:12]}, wanted {judged[:12]}; the file is damaged"):
        read_version(path, judged, SHAPES, {})


@pytest.mark.parametrize("num_bytes", [0, 4, 30, -1])
def test_a_truncated_file_is_refused_even_where_its_digest_is_the_one_asked_for(publish, num_bytes: int):
    path = publish()
    file = Path(path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])

    with pytest.raises(SwapError, match=r"model\.safetensors: .*; publish the version again"):
        read_version(path, digest(path), SHAPES, {})


@pytest.mark.parametrize("name", ["embed_tokens.weight", "model.embed_tokens.weight", "midlayer.bias"])
def test_a_tensor_that_the_draft_in_service_has_not_is_refused_by_name(publish, name: str):
    path = publish(**{name: torch.ones(2)})

    with pytest.raises(SwapError, match=rf"has the tensor {name}, .*nothing was swapped"):
        read_version(path, digest(path), SHAPES, {})


def test_a_tensor_that_is_missing_is_refused_by_name(publish):
    path = publish(norm__weight=None)

    with pytest.raises(SwapError, match=r"lacks the tensor norm\.weight; nothing was swapped"):
        read_version(path, digest(path), SHAPES, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_by_the_name_of_its_tensor(publish, value: float):
    path = publish(norm__weight=torch.tensor([1.0, value, 1.0]))

    with pytest.raises(SwapError, match=r"norm\.weight has values that are not finite; nothing was swapped"):
        read_version(path, digest(path), SHAPES, {})


class Model(torch.nn.Module):
    """A draft of SGLang's, as far as a swap goes: own weights, and a table that is the target's."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding.from_pretrained(torch.ones(4, 2))
        self.fc = torch.nn.Linear(3, 2, bias=False)
        torch.nn.init.zeros_(self.fc.weight)
        self.hot_token_id = WEIGHTS["d2t"] + torch.arange(2)
        self.is_smuggling = False

    def load_weights(self, pairs) -> None:
        self.fc.weight.data.copy_(dict(pairs)["fc.weight"])
        if self.is_smuggling:
            self.model.embed_tokens.weight.data.add_(1)


@pytest.fixture
def swapper() -> Swapper:
    runner = SimpleNamespace(model=Model())
    scheduler = SimpleNamespace(draft_worker=SimpleNamespace(_draft_worker=SimpleNamespace(draft_runner=runner)))
    return Swapper(scheduler, SHAPES, StageVersion(1, "first", "0" * 64))


def test_a_swap_makes_the_staged_version_the_incumbent_and_frees_what_was_staged(publish, swapper: Swapper):
    path = publish()
    swapper.begin_stage(StageVersion(7, path, digest(path)))

    swapper.apply(ApplyVersion(7))

    assert torch.equal(swapper.model.fc.weight, WEIGHTS["fc.weight"])
    assert (swapper.version, swapper.incumbent, swapper.num_swaps) == (7, 7, 1)
    with pytest.raises(SwapError, match="version 7 is not staged; nothing was swapped"):
        swapper.apply(ApplyVersion(7))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fc__weight": torch.ones(3, 2)}, r"fc\.weight has shape \(3, 2\), the draft in service \(2, 3\)"),
        ({"d2t": WEIGHTS["d2t"] + 1}, "it has another d2t than the draft in service"),
    ],
)
def test_another_shape_or_vocabulary_map_is_refused_before_anything_is_staged(publish, swapper: Swapper, changes, said):
    path = publish(**changes)
    swapper.begin_stage(StageVersion(7, path, digest(path)))

    with pytest.raises(SwapError, match=f"{said}; nothing was swapped"):
        swapper.apply(ApplyVersion(7))

    assert not swapper.model.fc.weight.any()


def test_a_version_on_trial_drafts_while_the_incumbent_stays_the_incumbent(publish, swapper: Swapper):
    path = publish()
    swapper.begin_stage(StageVersion(7, path, digest(path)))
    swapper.check_staged(7)

    swapper.put(7)

    assert torch.equal(swapper.model.fc.weight, WEIGHTS["fc.weight"])
    assert (swapper.version, swapper.incumbent, swapper.num_swaps) == (7, 1, 0)


def test_a_rank_that_could_not_stage_keeps_all_of_them_from_swapping(publish, swapper: Swapper):
    path = publish()
    heard: list[bool] = []
    swapper._agree = lambda is_ready: heard.append(is_ready)  # None: another rank is not ready
    swapper.begin_stage(StageVersion(7, path, digest(path)))

    with pytest.raises(SwapError, match="another rank could not stage version 7"):
        swapper.apply(ApplyVersion(7))

    assert heard == [True]
    assert swapper.version == 1
    assert not swapper.model.fc.weight.any()


def test_a_rank_whose_staging_failed_says_so_to_the_others_before_it_raises_its_own_error(publish, swapper: Swapper):
    path = publish(norm__weight=None)
    heard: list[bool] = []
    swapper._agree = lambda is_ready: heard.append(is_ready)
    swapper.begin_stage(StageVersion(7, path, digest(path)))

    with pytest.raises(SwapError, match=r"lacks the tensor norm\.weight"):
        swapper.apply(ApplyVersion(7))

    assert heard == [False]


@pytest.mark.parametrize("act", [lambda s: s.apply(ApplyVersion(7)), lambda s: s.put(7)])
def test_a_copy_that_reaches_the_targets_table_is_an_alarm(publish, swapper: Swapper, act):
    path = publish()
    swapper.begin_stage(StageVersion(7, path, digest(path)))
    swapper.wait_staged()
    swapper.model.is_smuggling = True

    with pytest.raises(SwapError, match="version 7 changed the target's embedding table; restart the server now"):
        act(swapper)
