"""Train the demo's target: a small Llama that really answers the demo's requests.

Every training sequence is one whole chat from position 0, as the server will
see it; chats of like length share a batch, so little is padding. Padding is on
the right, where causal attention cannot see it, and carries no loss.

Run: python -m onlinespec.world.target --out DIR [--tokens N] [--seed S]
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from tqdm import tqdm

from onlinespec.world import corpus
from onlinespec.world.hf import GenerationConfig, LlamaConfig, LlamaForCausalLM
from onlinespec.world.muon import Muon
from onlinespec.world.tokenizer import (
    BOS_ID,
    END_ID,
    MAX_POSITIONS,
    PAD_ID,
    VOCAB_SIZE,
    encode_chat,
    save_tokenizer,
    train_tokenizer,
)

BATCH_TOKENS = 2048
POOL_CHATS = 512
MUON_LR = 0.02
ADAMW_LR = 4e-3
WARMUP_FRAC = 0.03
TWO_TURN_FRAC = 0.1
SYSTEM_FRAC = 0.05
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "You are a careful assistant. Answer exactly.")
VALIDATION_SEED = 987_654_321


@dataclass(frozen=True)
class Batch:
    """Right-padded chats. ids_BT: token ids; weights_BT: each token's weight as something to predict."""

    ids_BT: torch.Tensor
    weights_BT: torch.Tensor


def build_target(
    hidden: int = 192, ffn: int = 384, layers: int = 8, heads: int = 4, kv_heads: int = 2, head_dim: int = 64
) -> LlamaForCausalLM:
    """Return an untrained target, float32, about 3.3 M parameters in the demo's shape."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def chats(seed: int) -> Iterator[list[tuple[str, str]]]:
    """Yield training chats as lists of (role, content), without end."""
    rng = random.Random(f"chats/{seed}")
    for request in corpus.training(seed):
        messages = [("user", request.user), ("assistant", request.answer)]
        if rng.random() < SYSTEM_FRAC:
            messages.insert(0, ("system", rng.choice(SYSTEM_PROMPTS)))
        if rng.random() < TWO_TURN_FRAC:
            follow_up = corpus.conversation(request.domain, rng)
            messages += [("user", follow_up.user), ("assistant", follow_up.answer)]
        yield messages


def pad(members: list[tuple[list[int], list[bool]]], prompt_weight: float) -> Batch:
    longest = max(len(ids) for ids, _ in members)
    ids_BT = torch.full((len(members), longest), PAD_ID)
    weights_BT = torch.zeros(len(members), longest)
    for row, (ids, is_answer) in enumerate(members):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        weights_BT[row, : len(ids)] = torch.tensor([1.0 if answer else prompt_weight for answer in is_answer])
    return Batch(ids_BT, weights_BT)


def batches(seed: int, tokenizer: Tokenizer, prompt_weight: float) -> Iterator[Batch]:
    """Yield batches of at most BATCH_TOKENS positions, chats of like length together, without end."""
    rng = random.Random(f"batches/{seed}")
    source = (encode_chat(tokenizer, messages) for messages in chats(seed))
    while True:
        pool = sorted(itertools.islice(source, POOL_CHATS), key=lambda chat: len(chat[0]))
        cut: list[list[tuple[list[int], list[bool]]]] = [[]]
        for chat in pool:
            if (len(cut[-1]) + 1) * len(chat[0]) > BATCH_TOKENS:
                cut.append([])
            cut[-1].append(chat)
        rng.shuffle(cut)
        yield from (pad(members, prompt_weight) for members in cut)


def weighted_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Return the weighted mean cross-entropy of the next token, in nats."""
    logits_BTV = model(input_ids=batch.ids_BT[:, :-1], use_cache=False).logits
    losses_N = functional.cross_entropy(logits_BTV.flatten(0, 1), batch.ids_BT[:, 1:].flatten(), reduction="none")
    weights_N = batch.weights_BT[:, 1:].flatten()
    return (losses_N * weights_N).sum() / weights_N.sum()


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, tokenizer: Tokenizer, per_domain: int = 50) -> float:
    """Return the mean loss on live answers, nats per answer token, domains weighted evenly."""
    losses = []
    for domain in corpus.DOMAINS:
        requests = itertools.islice(corpus.live(domain, VALIDATION_SEED), per_domain)
        members = [encode_chat(tokenizer, [("user", r.user), ("assistant", r.answer)]) for r in requests]
        losses.append(weighted_loss(model, pad(members, prompt_weight=0.0)).item())
    return sum(losses) / len(losses)


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for embedding and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2] + [model.model.embed_tokens.weight]
    return [Muon(matrices, lr=MUON_LR), torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0)]


def save_target(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights (bfloat16), configuration and tokenizer as a Hugging Face model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = LlamaForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded.bfloat16()
    rounded.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=END_ID, pad_token_id=PAD_ID)
    rounded.save_pretrained(folder)
    # transformers 4 knows only the top-level name of what transformers 5 calls rope_parameters.
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings["rope_theta"] = settings["rope_parameters"]["rope_theta"]
    settings["torch_dtype"] = settings["dtype"]
    path.write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, folder)


@dataclass(frozen=True)
class Stage:
    """One run of training.

    num_tokens: how long, padding not counted. seed: of the chats, and of fresh
    weights. prompt_weight: weight of a prompt token's loss; an answer token's is 1.
    peak_frac: highest learning rate, as a fraction of MUON_LR and ADAMW_LR.
    start: folder of the target to go on from; None means fresh weights and a new tokenizer.
    """

    num_tokens: int
    seed: int
    prompt_weight: float
    peak_frac: float
    start: Path | None


def begin(stage: Stage) -> tuple[LlamaForCausalLM, Tokenizer]:
    """Return the model and tokenizer a stage starts with."""
    torch.manual_seed(stage.seed)
    if stage.start is None:
        return build_target(), train_tokenizer(stage.seed)
    model = LlamaForCausalLM.from_pretrained(stage.start, dtype=torch.float32)
    return model.train(), Tokenizer.from_file(str(stage.start / "tokenizer.json"))


def train(folder: Path, stage: Stage, save_every_tokens: int = 250_000) -> float:
    """Run a stage and write the target to a folder, also every save_every_tokens tokens.

    Returns the validation loss in nats per answer token, before rounding to bfloat16.
    Raises: OSError if the start folder holds no model.
    """
    model, tokenizer = begin(stage)
    optimizers = build_optimizers(model)
    seen = 0
    with tqdm(total=stage.num_tokens, unit="tok", unit_scale=True, mininterval=5) as progress:
        for batch in batches(stage.seed, tokenizer, stage.prompt_weight):
            # Linear warm-up, then linear decay to a hundredth.
            done = seen / stage.num_tokens
            pace = stage.peak_frac * min(1.0, (done + 1e-3) / WARMUP_FRAC) * max(0.01, 1 - done)
            for optimizer, lr in zip(optimizers, (MUON_LR, ADAMW_LR), strict=True):
                optimizer.param_groups[0]["lr"] = lr * pace
            loss = weighted_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            fresh = int((batch.ids_BT != PAD_ID).sum())
            progress.update(fresh)
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if (seen + fresh) // save_every_tokens > seen // save_every_tokens:
                save_target(model, tokenizer, folder)
                progress.write(f"{seen + fresh} tokens: validation loss {validation_loss(model, tokenizer):.4f}")
            seen += fresh
            if seen >= stage.num_tokens:
                break
    save_target(model, tokenizer, folder)
    return validation_loss(model, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's target model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--tokens", type=int, default=2_200_000, help="training tokens, padding not counted")
    parser.add_argument("--seed", type=int, default=0, help="seed of chats, tokenizer and fresh weights")
    parser.add_argument("--prompt-weight", type=float, default=0.1, help="loss weight of prompt tokens")
    parser.add_argument("--peak-frac", type=float, default=1.0, help="fraction of the full learning rates")
    parser.add_argument("--start", type=Path, default=None, help="folder of a target to go on from")
    arguments = parser.parse_args()
    stage = Stage(arguments.tokens, arguments.seed, arguments.prompt_weight, arguments.peak_frac, arguments.start)
    loss = train(arguments.out, stage)
    print(f"validation loss {loss:.4f} nats per answer token; written to {arguments.out}")


if __name__ == "__main__":
    main()
