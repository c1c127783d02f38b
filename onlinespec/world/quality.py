"""Measure whether a target really answers the demo's requests, on live prompts.

The world is fit for the demo when every domain copies its details, ends its
answers, and hardly ever gives the same answer twice: otherwise a draft's
accept length would show memory of answers, not learning.

Run: python -m onlinespec.world.quality DIR [--prompts N] [--seed S]
"""

import argparse
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from onlinespec.world import corpus
from onlinespec.world.hf import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase
from onlinespec.world.target import chats

MAX_ANSWER_TOKENS = 200
GENERATION_BATCH = 50
# More chats than the default training budget reads, so "seen" is an upper bound.
NUM_TRAINING_CHATS = 25_000


@dataclass(frozen=True)
class Generated:
    """A greedy answer. num_tokens counts the closing <|end|>; has_ended says whether there was one."""

    text: str
    num_tokens: int
    has_ended: bool


@dataclass(frozen=True)
class Quality:
    """What a domain's answers are like; every share is a fraction of its prompts."""

    ended_frac: float
    exact_frac: float
    copied_frac: float
    distinct_frac: float
    seen_frac: float
    mean_tokens: float


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Load a target as saved (weights rounded to bfloat16), to compute in float32.

    Raises: OSError if the folder holds no model.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left")


@torch.inference_mode()
def generate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, users: list[str]) -> list[Generated]:
    """Answer each user message greedily, with at most MAX_ANSWER_TOKENS tokens."""
    answers = []
    for start in range(0, len(users), GENERATION_BATCH):
        conversations = [[{"role": "user", "content": user}] for user in users[start : start + GENERATION_BATCH]]
        prompts = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
        ids_BT = model.generate(  # type: ignore[misc]
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=MAX_ANSWER_TOKENS,
        )
        for row in ids_BT[:, inputs["input_ids"].shape[1] :].tolist():
            has_ended = tokenizer.eos_token_id in row
            body = row[: row.index(tokenizer.eos_token_id)] if has_ended else row
            answers.append(Generated(str(tokenizer.decode(body)), len(body) + has_ended, has_ended))
    return answers


def copies(answer: str, details: tuple[str, ...]) -> bool:
    """Say whether every detail stands in the answer as a whole word."""
    return all(re.search(rf"(?<!\w){re.escape(detail)}(?!\w)", answer) for detail in details)


def measure(generated: list[Generated], requests: list[corpus.Conversation], seen: set[str]) -> Quality:
    """Compare one domain's answers with its requests; seen holds the answers of the training corpus."""
    pairs = list(zip(generated, requests, strict=True))
    count = len(pairs)
    return Quality(
        ended_frac=sum(answer.has_ended for answer in generated) / count,
        exact_frac=sum(answer.has_ended and answer.text == request.answer for answer, request in pairs) / count,
        copied_frac=sum(copies(answer.text, request.details) for answer, request in pairs) / count,
        distinct_frac=len({answer.text for answer in generated}) / count,
        seen_frac=sum(answer.text in seen for answer in generated) / count,
        mean_tokens=sum(answer.num_tokens for answer in generated) / count,
    )


def training_answers(seeds: list[int]) -> set[str]:
    return {
        content
        for seed in seeds
        for messages in itertools.islice(chats(seed), NUM_TRAINING_CHATS)
        for role, content in messages
        if role == "assistant"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo's target on live prompts.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=100, help="live prompts per domain")
    parser.add_argument("--seed", type=int, default=1, help="seed of the live prompts")
    parser.add_argument("--training-seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the training stages")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.folder)
    seen = training_answers(arguments.training_seeds)
    print("| domain | ended | exact | details copied | distinct | seen in training | answer tokens |")
    print("|---|---|---|---|---|---|---|")
    for domain in corpus.DOMAINS:
        requests = list(itertools.islice(corpus.live(domain, arguments.seed), arguments.prompts))
        q = measure(generate(model, tokenizer, [request.user for request in requests]), requests, seen)
        print(
            f"| {domain} | {q.ended_frac:.1%} | {q.exact_frac:.1%} | {q.copied_frac:.1%} "
            f"| {q.distinct_frac:.1%} | {q.seen_frac:.1%} | {q.mean_tokens:.1f} |"
        )


if __name__ == "__main__":
    main()
