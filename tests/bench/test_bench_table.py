"""The documents' tables from the JSON: what is written between the markers, and when it is out of step."""

import importlib.util
import json
from pathlib import Path

import pytest

from onlinespec.bench.provenance import Provenance
from onlinespec.bench.result import Cell, Result, Sample, Settings, Suite, write_result

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "bench_table.py"
SPEC = importlib.util.spec_from_file_location("bench_table", SCRIPT)
bench_table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench_table)

SECTION = "<!-- {0}:begin -->\nold\n<!-- {0}:end -->\n"
README = f"# Title\n\n{SECTION.format('bench')}behind\n"
RESULTS = f"# Title\n\n{SECTION.format('bench')}{SECTION.format('gpu')}{SECTION.format('bfloat16')}behind\n"
LEARNED = {
    "command": "python benchmarks/bench_learning.py",
    "time": "2026",
    "rows": [
        {
            "arm": "ours",
            "seed": 3,
            "commit": "abc",
            "curves": [[[0, 1.0], [900, 1.63]], [[0, 1.0], [901, 1.84]]],
            "training_cpu_s": 12.4,
        }
    ],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with both documents, one result of a bench, one of a script, and the JSON of something else."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "other.json").write_text('{"rows": []}')
    (results / "list.json").write_text("[]")
    (results / "bfloat16.json").write_text(json.dumps(LEARNED))
    (results / "2026-12-01-gpu-rows.json").write_text("{}")
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "benchmarks" / "RESULTS.md").write_text(RESULTS)
    settings = Settings(
        base_url="u",
        model="m",
        suites=[Suite("demo", 2, "d")],
        concurrencies=[4],
        temperatures=[0.0],
        max_tokens=8,
        seed=1,
        is_streamed=True,
        num_warmup=0,
        is_flushed=False,
    )
    session = Provenance("2026", "onlinespec bench accept", "abc+", {}, {}, {"version": "0.5.23"}, None)
    counted = {"num_verify_steps": 4, "num_output_tokens": 9, "histogram": [2, 2]}
    samples = [
        Sample(number=n, turn=0, domain="code", sent_s=0.0, done_s=1.0, num_correct_drafts=2 + n, **counted)
        for n in range(2)
    ]
    cell = Cell("demo", 4, 0.0, samples=samples, is_complete=True)
    cell.summarise()
    write_result(results / "a.json", Result(settings, [session], [cell, Cell("demo", 8, 0.0)]))
    return tmp_path


def test_both_documents_get_their_rows_between_the_markers_and_keep_the_rest(root: Path):
    status = bench_table.main([], root)

    readme, results = (root / "README.md").read_text(), (root / "benchmarks/RESULTS.md").read_text()
    row = next(line for line in readme.splitlines() if "a.json" in line)
    assert status == 0
    assert row.startswith("| `a.json` | demo | 4 | 0 | 1.62 (")
    assert row.endswith("| 18 |")
    assert "### `benchmarks/results/a.json`\n`onlinespec bench accept` (2026, commit abc+)" in results
    assert "Server: version 0.5.23." in results
    for text in (readme, results):
        assert text.startswith("# Title\n\n<!-- bench:begin -->\n")
        assert text.endswith(" -->\nbehind\n")
        assert "old" not in text


def test_a_scripts_json_fills_the_section_of_its_name_and_names_its_command_and_commits(root: Path):
    bench_table.main([], root)

    results = (root / "benchmarks/RESULTS.md").read_text()
    assert (
        "<!-- bfloat16:begin -->\n`python benchmarks/bench_learning.py` (2026, rows of commit abc)\n\n"
        "| arm | seed | code | support | CPU s |\n| --- | --- | --- | --- | --- |\n"
        "| ours | 3 | 1.63 | 1.84 | 12 |\n<!-- bfloat16:end -->\n"
    ) in results


def test_a_gpu_check_without_a_result_reads_not_measured_and_one_with_it_names_the_file(root: Path):
    bench_table.main([], root)

    rows = {line.split(" | ")[0]: line for line in (root / "benchmarks/RESULTS.md").read_text().splitlines()}
    assert rows["| `rows`"].endswith("| `results/2026-12-01-gpu-rows.json` |")
    assert rows["| `tap`"].endswith("| not measured on a GPU |")


def test_every_section_has_its_file_here_and_every_file_its_section_or_kind():
    files = {path.stem for path in (bench_table.ROOT / "benchmarks" / "results").glob("*.json")}
    benches = {Path(name).stem for name in bench_table.results(bench_table.ROOT)}

    assert set(bench_table.SECTIONS) <= files
    others = files - set(bench_table.SECTIONS) - benches
    assert {name for name in others if "-gpu-" not in name} == {"gate-differences"}


def test_check_changes_nothing_and_tells_which_document_is_late(root: Path, capsys):
    bench_table.main([], root)
    (root / "README.md").write_text(README)

    status = bench_table.main(["--check"], root)

    assert status == 1
    assert capsys.readouterr().out.endswith("README.md: is not in step; run python benchmarks/bench_table.py\n")
    assert (root / "README.md").read_text() == README


def test_documents_in_step_pass_and_writing_again_changes_nothing(root: Path):
    bench_table.main([], root)
    before = (root / "README.md").read_bytes()

    assert bench_table.main(["--check"], root) == 0
    assert bench_table.main([], root) == 0
    assert (root / "README.md").read_bytes() == before


@pytest.mark.parametrize("text", ["none", README + README, "<!-- bench:end -->\n<!-- bench:begin -->\n"])
def test_a_document_without_one_pair_of_markers_is_refused_by_name(root: Path, text: str):
    (root / "README.md").write_text(text)

    with pytest.raises(ValueError, match=r"README\.md: wanted one line <!-- bench:begin -->"):
        bench_table.main(["--check"], root)


def test_the_script_refuses_words_it_does_not_know(root: Path):
    with pytest.raises(SystemExit, match="usage"):
        bench_table.main(["--chekc"], root)


def test_the_documents_of_this_checkout_are_in_step_with_its_results():
    assert bench_table.main(["--check"]) == 0
