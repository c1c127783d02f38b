"""`bench accept` without a server, and what it writes down."""

import asyncio
import json
import socket
from pathlib import Path

import pytest

import onlinespec
from onlinespec.bench.accept import drive, report, summaries_of, write_report
from onlinespec.bench.client import Answer, Prompt, Sampling
from onlinespec.errors import BenchError


@pytest.fixture
def silent_url() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def good(domain: str, steps: int, correct: int) -> Answer:
    counters = {"num_output_tokens": 2, "num_verify_steps": steps, "num_correct_drafts": correct}
    return Answer(Prompt.of_text(domain, "Hello"), 0.0, chunk_s=[1.0], **counters)


def test_where_no_server_answers_the_address_is_named(silent_url: str):
    prompts = [Prompt.of_text("chat", "Hello")]

    with pytest.raises(BenchError, match=rf"^{silent_url}: .*is the server running, and is this its address\?$"):
        asyncio.run(drive(silent_url, prompts, Sampling(), concurrency=2))


def test_there_is_a_row_per_domain_in_order_of_appearance_and_a_total():
    answers = [good("b", 1, 3), good("a", 3, 1), good("b", 1, 1)]

    rows = summaries_of(answers)

    assert [(row.name, row.accept_length) for row in rows] == [("b", 3.0), ("a", 4 / 3), ("all", 2.0)]


def test_a_single_domain_needs_no_total():
    assert [row.name for row in summaries_of([good("a", 1, 0), good("a", 1, 0)])] == ["a"]


def test_a_report_on_disk_says_what_was_measured_and_where_it_came_from(tmp_path: Path):
    path = tmp_path / "result.json"

    write_report(path, report(summaries_of([good("a", 2, 1)]), {"suite": "demo", "concurrency": 4}))

    found = json.loads(path.read_text())
    assert (found["kind"], found["onlinespec"]) == ("bench accept", onlinespec.__version__)
    assert found["settings"] == {"suite": "demo", "concurrency": 4}
    assert [(row["name"], row["accept_length"], row["ttft_p50_s"]) for row in found["rows"]] == [("a", 1.5, 1.0)]
    assert {"command", "time", "machine"} <= found.keys()
