"""The demo's tokenizer: a byte-level BPE trained on the demo's corpus.

Every digit is a token of its own, so that copying a number is copying
tokens, and never depends on how a number happens to be cut.
"""

import itertools
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from onlinespec.world import corpus

PAD, BOS, END, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = (
    "<|pad|>",
    "<|bos|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
PAD_ID, BOS_ID, END_ID = range(3)
VOCAB_SIZE = 1792
MAX_POSITIONS = 2048

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(seed: int, num_conversations: int = 6000) -> Tokenizer:
    """Train the tokenizer on the first conversations of the training corpus.

    The vocabulary has at most VOCAB_SIZE ids; the special tokens come first.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    requests = itertools.islice(corpus.training(seed), num_conversations)
    tokenizer.train_from_iterator((text for r in requests for text in (r.user, r.answer)), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer and its chat template where transformers finds them."""
    names = {"bos_token": BOS, "eos_token": END, "pad_token": PAD}
    marks = {**names, "additional_special_tokens": [SYSTEM, USER, ASSISTANT]}
    settings = {
        **marks,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(marks, indent=2) + "\n")


def encode_chat(tokenizer: Tokenizer, messages: list[tuple[str, str]]) -> tuple[list[int], list[bool]]:
    """Return the token ids of a chat, as CHAT_TEMPLATE renders it, and which of them are answer.

    messages: (role, content) pairs. An answer's closing <|end|> counts as answer.

    Raises: ValueError if a role is not system, user or assistant.
    """
    ids, is_answer = [BOS_ID], [False]
    for role, content in messages:
        if f"<|{role}|>" not in SPECIAL_TOKENS:
            raise ValueError(f"role {role!r} is not in the chat template; wanted system, user or assistant")
        body = [*tokenizer.encode(content).ids, END_ID]
        ids += [SPECIAL_TOKENS.index(f"<|{role}|>"), *body]
        is_answer += [False, *([role == "assistant"] * len(body))]
    return ids, is_answer
