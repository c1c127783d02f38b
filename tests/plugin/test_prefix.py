"""Requests of another generation share no cached prefix with those before."""

from types import SimpleNamespace

import pytest

from onlinespec.plugin.prefix import PrefixGeneration


def asked(extra_key: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(extra_key=extra_key)


def named(generation: PrefixGeneration, extra_key: str | None) -> str | None:
    request = asked(extra_key)
    generation.name([request])
    return request.extra_key


@pytest.mark.parametrize("extra_key", [None, "tenant"])
def test_the_first_generation_leaves_keys_as_they_are(extra_key: str | None):
    assert named(PrefixGeneration(), extra_key) == extra_key


def test_keys_of_another_generation_or_another_client_s_key_never_meet():
    generation, seen = PrefixGeneration(), []

    for _ in range(3):
        seen += [named(generation, key) for key in (None, "a", "b")]
        generation.renew()

    assert len(set(seen)) == 9
    assert named(generation, "a") == named(generation, "a")


def test_requests_that_came_together_are_each_named_and_other_messages_left_alone():
    generation = PrefixGeneration()
    generation.renew()
    together, other = SimpleNamespace(batch=[asked(), asked("a")]), SimpleNamespace()

    generation.name([together, other])

    assert all(one.extra_key.endswith("|draft 1") for one in together.batch)
    assert not vars(other)
