"""What a chat template writes between a question and any answer, whatever it writes behind the last question."""

import pytest

from onlinespec.plugin.template import generation_prompt


class Tokenizer:
    """Questions are 1 and x, answers 2 and x, an answer is opened by 2 and, where it is still to come, by `thought`."""

    chat_template = "there is one"

    def __init__(self, thought: tuple[int, ...] = ()):
        self._thought = thought

    def apply_chat_template(self, turns, *, tokenize: bool, return_dict: bool, add_generation_prompt: bool):
        assert (tokenize, return_dict) == (True, False)
        tokens = [token for turn in turns for token in ((1 if turn["role"] == "user" else 2), 9, 3)]
        return tokens + ([2, *self._thought] if add_generation_prompt else [])


@pytest.mark.parametrize("thought", [(), (7, 8)])
def test_it_is_what_stands_before_an_earlier_answer_too(thought: tuple[int, ...]):
    assert generation_prompt(Tokenizer(thought)) == [2]


def test_without_a_template_there_is_none():
    tokenizer = Tokenizer()
    tokenizer.chat_template = None

    assert generation_prompt(tokenizer) == []
    assert generation_prompt(None) == []
