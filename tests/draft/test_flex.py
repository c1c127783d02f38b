"""FlexAttention as it is compiled on a GPU: any number of rows, with gradients. On a CPU: `test_place`."""

import pytest
import torch

from onlinespec.draft import flex
from onlinespec.draft.place import placed
from onlinespec.draft.rows import build_rows, draft_positions
from tests.draft.tiny import build_draft, build_embedding, build_sample


def rows_of(num_answers: list[int], config, num_steps: int = 3):
    samples = [build_sample(i, 5, num, config=config) for i, num in enumerate(num_answers)]
    return build_rows(
        samples, [draft_positions(sample) for sample in samples], build_embedding(config=config), num_steps
    )


def test_inductor_is_kept_from_its_decoding_kernel_which_has_no_tiles_for_33_to_127_rows(monkeypatch):
    asked, attend = [], flex.flex_attention
    monkeypatch.setattr(flex, "flex_attention", lambda *of, **how: (asked.append(how), attend(*of, **how))[1])
    draft = build_draft(head_dim=16)
    draft.is_flex = True

    with torch.no_grad(), pytest.warns(UserWarning, match="without torch.compile"):
        draft.states(rows_of([9], draft.config))

    assert all(how["kernel_options"]["FORCE_USE_FLEX_ATTENTION"] for how in asked)
    assert len(asked) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU: the compiled kernel and its gradients")
@pytest.mark.parametrize("num_answers", [[20], [33], [60], [100], [127], [40, 300]])
@pytest.mark.parametrize("is_half", [False, True])
def test_the_compiled_kernel_gives_the_states_and_gradients_of_the_math(num_answers: list[int], is_half: bool):
    found = []
    for is_flex in (False, True):
        draft = build_draft(head_dim=16, max_position_embeddings=512).to("cuda")
        draft.is_flex = is_flex
        rows = placed(rows_of(num_answers, draft.config), draft.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=is_half):
            states = draft.states(rows)
        states.float().square().mean().backward()
        found.append((states.float(), draft.midlayer.self_attn.k_proj.weight.grad))

    for one, other in zip(*found, strict=True):
        assert torch.linalg.vector_norm(one - other) < (0.05 if is_half else 1e-3) * torch.linalg.vector_norm(one)
