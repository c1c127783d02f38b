"""A draft that fits the demo's first domain: what a team has before its traffic moves. By the product's own commands.

Chats of the domain from the world's generator go through `onlinespec record-dataset` and `onlinespec train`; no server.
SGLang loads OUT/train/draft. What is there already is used again.

Run: python benchmarks/first_draft.py OUT [--chats 240] [--epochs 2] [--target DIR] [--set trainer.device=cuda]
"""

import argparse
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

from onlinespec.world import WORLD
from onlinespec.world.corpus import FIRST_DOMAIN, live

SEED = 4001
"""of the chats; no bench asks them"""


def onlinespec(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "onlinespec.cli", *map(str, words)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--chats", type=int, default=240)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--target", default=WORLD)
    parser.add_argument("--set", action="append", default=[], help="section.field=value of the training")
    options = parser.parse_args()
    draft = options.out / "train" / "draft"
    if (draft / "config.json").exists():
        print(f"{draft} is there")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    chats, rows = options.out / "chats.jsonl", options.out / "rows"
    with chats.open("w") as file:
        for chat in islice(live(FIRST_DOMAIN, SEED), options.chats):
            turns = [{"role": "user", "content": chat.user}, {"role": "assistant", "content": chat.answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    onlinespec("record-dataset", chats, "--target", options.target, "--out", rows)
    trained = ("--draft", "init", "--out", options.out / "train", "--epochs", options.epochs, "--eval-steps", 100)
    sets = [part for override in options.set for part in ("--set", override)]
    onlinespec("train", "--recording", rows, "--target", options.target, *trained, *sets)


if __name__ == "__main__":
    main()
