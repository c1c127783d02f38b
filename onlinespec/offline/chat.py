"""Conversations from a JSONL file: OpenAI chat or ShareGPT. No torch.

A line is {"messages": [{"role", "content"}, ...]} or {"conversations": [{"from", "value"}, ...]}.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onlinespec.errors import DataError

Messages = list[dict[str, Any]]
ASSISTANT = "assistant"
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": ASSISTANT, "assistant": ASSISTANT, "system": "system"}
_WANTED = 'wanted {"messages": [{"role", "content"}, ...]} or {"conversations": [{"from", "value"}, ...]}'


def read_chats(path: Path) -> Iterator[Messages]:
    """The conversations of a file, in order.

    Raises: DataError naming the file, or its line, and what was wanted.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a JSONL file of conversations")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON ({error}); {_WANTED}") from error
            yield _messages(entry, f"{path}:{number}")


def _messages(entry: object, where: str) -> Messages:
    raw = entry if isinstance(entry, dict) else {}
    if isinstance(raw.get("messages"), list):
        messages = raw["messages"]
        if all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages):
            return messages
    elif isinstance(raw.get("conversations"), list):
        turns = raw["conversations"]
        if all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
            return [{"role": _role(turn.get("from"), where), "content": turn["value"]} for turn in turns]
    raise DataError(f"{where}: {_WANTED}")


def _role(name: object, where: str) -> str:
    if name not in _SHAREGPT_ROLES:
        raise DataError(f'{where}: "from" is {name!r}, wanted one of {", ".join(_SHAREGPT_ROLES)}')
    return _SHAREGPT_ROLES[str(name)]
