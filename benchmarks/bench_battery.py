"""A battery of bad candidates, and one good one, offered to the gate of a real server under load.

Which stage refuses each, by the journal: sound (before a race), race (held-out requests), trial (live traffic), server
(it would not stage or swap). The target's checksum (SGLang's own, over all its tensors) and greedy answers must be the
same before and after. Two domains, each a tenant. Held-out share 0.9 and short races: minutes, not a day.

Run: python benchmarks/bench_battery.py OUT.json [--candidates DIR] [--steps 64] [--limit_s 480]; candidates that are
there are used again.
"""

import argparse
import asyncio
import json
import shutil
import time
import urllib.request
from functools import partial
from itertools import islice
from pathlib import Path

import battery_candidates
from battery_candidates import GOOD, INCUMBENT
from live import LiveServer, Traffic, serving
from provenance import provenance
from record_streams import free_port, plain_prompts

from onlinespec.bench.accept import drive
from onlinespec.bench.client import Sampling
from onlinespec.draft.header import digest
from onlinespec.offers import offer
from onlinespec.versions.journal import CanaryEnded, Journal, Judged, Promoted, Published, RaceStarted, SwapFailed
from onlinespec.world.corpus import FIRST_DOMAIN, SHIFT_DOMAIN

BAD = (
    "NaN",
    "truncated file",
    "wrong digest",
    "embed_tokens smuggled in",
    "extra layers",
    "wrong vocabulary map",
    "off-by-one aux layers",
    "zeros",
    "random",
    "trained for another target",
    "off-by-one aux layers, not said",
    "overfit on ten requests",
    "good only on one slice",
)
SETS = (
    "supervisor.sidecar=true",
    "trainer.enabled=false",
    "gate.holdout_frac=0.9",
    "gate.futility_requests=12",
    "gate.max_requests=160",
    "gate.min_span_s=3",
    "gate.slice_min_frac=0.3",
    "canary.block_steps=8",
    "canary.min_pairs=4",
    "canary.harm_tolerance_tokens=0.3",
    "canary.max_step_cost_ratio=1.5",
)
USERS_PER_DOMAIN = 2
MAX_TOKENS = 40


def target_checksum(server: LiveServer) -> str:
    """SGLang's, over every tensor of the target, the embedding table among them."""
    body = json.dumps({"action": "checksum", "selector": "target"}).encode()
    request = urllib.request.Request(f"{server.base_url}/weights_checker", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["per_engine_checksum"]


def greedy_answers(server: LiveServer) -> list[str]:
    asked = [p for domain in (FIRST_DOMAIN, SHIFT_DOMAIN) for p in islice(plain_prompts(domain, 9), 4)]
    answers = asyncio.run(drive(server.base_url, asked, Sampling(max_tokens=MAX_TOKENS), 1))
    assert not any(answer.error for answer in answers)
    return [answer.text for answer in answers]


def outcomes(server: LiveServer) -> list[dict[str, object]]:
    """One row for each candidate that is done, from the journal."""
    events = Journal(server.paths).read()
    raced = {event.candidate_digest for event in events if isinstance(event, RaceStarted)}
    versions = {event.digest: event.version for event in events if isinstance(event, Published)}
    rows = []
    for event in events:
        if not isinstance(event, Judged):
            continue
        found = event.verdict
        numbers = {name: found.get(name) for name in ("num_requests", "mean_gain_tokens", "e_value", "threshold")}
        row = {"candidate": event.source, "stage": "sound", "reason": found["reason"], **numbers}
        if event.candidate_digest in raced:
            row["stage"] = "race"
        if found["decision"] == "promote":
            version = versions.get(event.candidate_digest)
            after = [e for e in events if isinstance(e, CanaryEnded | SwapFailed | Promoted) and e.version == version]
            if not after:
                continue  # on trial
            row |= {"stage": _stage_of(after), "reason": _reason_of(after[-1])}
        rows.append(row)
    return rows


def _stage_of(after: list[CanaryEnded | SwapFailed | Promoted]) -> str:
    if isinstance(after[-1], Promoted):
        return "promoted"
    return "server" if isinstance(after[-1], SwapFailed) else "trial"


def _reason_of(event: CanaryEnded | SwapFailed | Promoted) -> str:
    return event.evidence["reason"] if isinstance(event, CanaryEnded) else event.reason


def offer_all(server: LiveServer, candidates: Path, stays: float) -> list[dict[str, object]]:
    """All at once, the good one last; each row as it comes."""
    for name in (*BAD, GOOD):
        wanted = digest(candidates / INCUMBENT) if name == "wrong digest" else ""
        print(offer(server.paths.root, candidates / name, wanted), flush=True)
    shown = 0
    while time.monotonic() < stays:
        rows = outcomes(server)
        for row in rows[shown:]:
            print(f"{row['candidate']:<34}{row['stage']:<10}{row['reason']}", flush=True)
        shown = len(rows)
        if shown == len(BAD) + 1:
            break
        time.sleep(1)
    return outcomes(server)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--candidates", type=Path, default=Path("runs/battery"))
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--limit_s", type=float, default=480)
    parser.add_argument("--build-only", action="store_true")
    options = parser.parse_args()
    candidates = options.candidates
    if not all((candidates / name).is_dir() for name in (INCUMBENT, GOOD, *BAD)):
        shutil.rmtree(candidates, ignore_errors=True)
        candidates.mkdir(parents=True)
        battery_candidates.build(candidates, options.steps)
    if options.build_only:
        return
    until_s = time.monotonic() + options.limit_s
    with serving(free_port(), SETS, str(candidates / INCUMBENT)) as server:
        before = target_checksum(server), greedy_answers(server)
        traffic = [
            Traffic(
                server.base_url,
                partial(plain_prompts, domain, 701),
                USERS_PER_DOMAIN,
                Sampling(max_tokens=MAX_TOKENS, tenant=domain),
            )
            for domain in (FIRST_DOMAIN, SHIFT_DOMAIN)
        ]
        for users in traffic:
            users.start()
        rows = offer_all(server, candidates, until_s)
        answers = [answer for users in traffic for answer in users.stop()]
        after = target_checksum(server), greedy_answers(server)
    stages = {str(row["candidate"]): row["stage"] for row in rows}
    result = {
        **provenance(),
        "settings": [*SETS, f"steps={options.steps}"],
        "rows": rows,
        "undecided": [name for name in (*BAD, GOOD) if name not in stages],
        "requests": len(answers),
        "failed_requests": sum(bool(answer.error) for answer in answers),
        "bad_promoted": [name for name in BAD if stages.get(name) == "promoted"],
        "good_promoted": stages.get(GOOD) == "promoted",
        "is_target_checksum_equal": before[0] == after[0],
        "target_checksum": after[0],
        "are_greedy_answers_equal": before[1] == after[1],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=1))


if __name__ == "__main__":
    main()
