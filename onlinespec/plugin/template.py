"""What a chat template writes around a conversation: the gate finds a conversation's first turn by it."""

from typing import Any


def generation_prompt(tokenizer: Any) -> list[int]:
    """Tokens the chat template writes between a user's message and any answer to it, not only the last one.

    Some templates append more to the last turn (an empty think block); what an earlier answer does not
    show is cut off. Empty where there is no chat template.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return []

    def tokens(roles: str, add: bool) -> list[int]:
        turns = [{"role": {"u": "user", "a": "assistant"}[role], "content": "x"} for role in roles]
        return list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, add_generation_prompt=add))

    question = len(tokens("u", False))
    appended, answered = tokens("u", True)[question:], tokens("uau", False)[question:]
    common = 0
    while common < min(len(appended), len(answered)) and appended[common] == answered[common]:
        common += 1
    return appended[:common]
