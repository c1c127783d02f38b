"""Record the demo world's traffic, domain by domain and seed by seed, for the benchmarks that replay it.

A real server on its untrained draft, greedy, 16 users; rows as its plugin sends them. One recording per domain
and seed under OUT. 350 MB and half an hour on two cores.

Run: python benchmarks/record_streams.py OUT [--seeds 101,102,103,104,105] [--tokens 16000]; resumes.
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from live import Traffic, serving

from onlinespec.bench.client import Prompt, Sampling
from onlinespec.demo.run import free_port
from onlinespec.draft.header import target_digest
from onlinespec.draft.sample import Sample
from onlinespec.record.manifest import RowFacts
from onlinespec.record.reader import Recording
from onlinespec.record.recorder import Recorder
from onlinespec.trainer.assemble import Assembler
from onlinespec.trainer.prefix import PrefixRows
from onlinespec.wire.messages import RequestEnded, RequestStarted, Rows
from onlinespec.wire.sockets import SampleReceiver
from onlinespec.world import WORLD
from onlinespec.world.corpus import FIRST_DOMAIN, SHIFT_DOMAIN, prompts

HELD_OUT_SEED = 201
HELD_OUT_REQUESTS = 64
NUM_USERS = 16


def read_stream(root: Path, domain: str, seed: int) -> list[Sample]:
    return list(Recording(root / f"{domain}-{seed}"))


def write_stream(root: Path, domain: str, seed: int, samples: list[Sample]) -> None:
    """Under a temporary name first, so that what stands there is whole."""
    facts = RowFacts(
        target_digest=target_digest(WORLD),
        hidden_size=samples[0].aux_TA.shape[1] // 3,
        aux_layers=(2, 4, 5),
        teacher_top_k=samples[0].teacher_ids_Tk.shape[1],
    )
    folder = root / f".{domain}-{seed}"
    recorder = Recorder(folder, facts, "server", shard_bytes=2**24, max_bytes=2**32, created_s=time.time())
    assert all(recorder.add(sample) for sample in samples)
    recorder.close()
    folder.rename(root / f"{domain}-{seed}")


def plain_prompts(domain: str, seed: int) -> Iterator[Prompt]:
    return (Prompt.of_text(domain, text) for text in prompts(domain, seed))


def capture(server, domain: str, seed: int, num_tokens: int) -> list[Sample]:
    """Finished requests until they hold so many answer tokens."""
    receiver = SampleReceiver(server.paths.samples_endpoint)
    assembler, samples = Assembler(PrefixRows(2**26), 600, 2**30), []
    traffic = Traffic(server.base_url, partial(plain_prompts, domain, seed), NUM_USERS, Sampling(max_tokens=200))
    traffic.start()
    while sum(sample.num_answer_tokens for sample in samples) < num_tokens:
        received = receiver.receive(1.0)
        if received is None:
            continue
        message, frames = received
        if isinstance(message, RequestStarted):
            assembler.start(message)
        elif isinstance(message, Rows):
            assembler.rows(message, frames)
        elif isinstance(message, RequestEnded) and (sample := assembler.end(message)) is not None:
            samples.append(sample)
    traffic.stop()
    while receiver.receive(1.0) is not None:
        pass  # what belongs to no stream
    receiver.close()
    return samples


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="101,102,103,104,105")
    parser.add_argument("--tokens", type=int, default=16_000)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [(domain, HELD_OUT_SEED) for domain in (FIRST_DOMAIN, SHIFT_DOMAIN)]
    wanted += [(domain, int(seed)) for seed in options.seeds.split(",") for domain in (FIRST_DOMAIN, SHIFT_DOMAIN)]
    with serving(free_port(), ["capture.queue_bytes=1000000000"]) as server:
        for domain, seed in wanted:
            if (options.out / f"{domain}-{seed}").exists():
                continue
            server.flush()  # rows of a prefix that stands in the cache are not made again, and no one has them here
            is_held_out = seed == HELD_OUT_SEED
            samples = capture(server, domain, seed, 4_500 if is_held_out else options.tokens)
            write_stream(options.out, domain, seed, list(islice(samples, HELD_OUT_REQUESTS if is_held_out else None)))
            print(domain, seed, len(samples), "requests", flush=True)


if __name__ == "__main__":
    main()
