"""What a sample says of itself."""

from dataclasses import replace

import pytest

from onlinespec.draft.sample import VerifySteps
from tests.draft.tiny import build_sample


@pytest.mark.parametrize(
    ("versions", "mixed", "expected"),
    [
        ([], [], False),
        ([3, 3], [False, False], False),
        ([3, 4], [False, True], True),
        ([3, 4], [False, False], True),
        ([4, 4], [True, False], True),
    ],
)
def test_a_request_has_a_swap_where_more_than_one_draft_drafted_for_it(versions, mixed, expected):
    sample = replace(build_sample(), verify=VerifySteps(version=versions, is_mixed=mixed))

    assert sample.has_swap is expected
