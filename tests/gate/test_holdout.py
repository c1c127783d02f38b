"""Which side a conversation falls on."""

import pytest

from onlinespec.gate.holdout import first_user_span, group_of, is_holdout

KEY = bytes(range(32))
HEADER = [7, 8, 9]


def test_every_turn_of_a_conversation_shares_its_group():
    first = [1, 2, 3, *HEADER]
    second = [*first, 40, 41, 5, 6, *HEADER]

    groups = {group_of(KEY, "a", prompt[: first_user_span(prompt, HEADER)[0]]) for prompt in (first, second)}

    assert len(groups) == 1


@pytest.mark.parametrize(
    ("prompt", "header", "span", "is_first_turn"),
    [
        ([1, 2, 7, 8, 9], HEADER, 2, True),
        ([1, 2, 7, 8, 9, 3], HEADER, 2, True),
        ([1, 7, 8, 7, 8, 9, 4, 7, 8, 9], HEADER, 3, False),
        ([1, 2, 3], HEADER, 3, False),
        ([1, 7, 8], HEADER, 3, False),
        ([7, 8, 9, 1, 2, 7, 8, 9], HEADER, 5, True),
        ([7, 8, 9], HEADER, 3, False),
        ([1, 2], [], 2, False),
        ([], HEADER, 0, False),
    ],
)
def test_the_first_user_turn_ends_where_the_header_first_stands(prompt, header, span, is_first_turn):
    assert first_user_span(prompt, header) == (span, is_first_turn)


def test_the_group_depends_on_key_tenant_and_tokens():
    groups = [
        group_of(KEY, "a", [1, 2]),
        group_of(KEY[::-1], "a", [1, 2]),
        group_of(KEY, "b", [1, 2]),
        group_of(KEY, "a", [1, 3]),
        group_of(KEY, "a", [1, 2, 0]),
    ]

    assert len(set(groups)) == len(groups)
    assert group_of(KEY, "a", (1, 2)) == groups[0]


def test_the_held_out_share_is_what_was_asked_for():
    groups = [group_of(KEY, "a", [number]) for number in range(4000)]

    num_held_out = sum(is_holdout(group, 0.3) for group in groups)

    # Four standard deviations of a binomial.
    assert abs(num_held_out - 1200) < 4 * (4000 * 0.3 * 0.7) ** 0.5


def test_raising_the_share_takes_no_group_out_of_the_held_out_side():
    groups = [group_of(KEY, "a", [number]) for number in range(500)]

    assert all(is_holdout(group, 0.5) for group in groups if is_holdout(group, 0.3))


def test_a_short_key_is_refused():
    with pytest.raises(AssertionError):
        group_of(b"short", "a", [1])
