"""Every committed result reads strictly, and every table in a page is what its result files hold."""

from pathlib import Path

import pytest

from mmroute.bench import engine_schema, gate_schema, lmms_schema, report, schema, table

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "results").rglob("*.json"))
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
READERS = {
    "result/1": schema.read_result,
    "engine/1": engine_schema.read_engine,
    "gpu/1": engine_schema.read_gpu,
    "gate/1": gate_schema.read_gate,
    "gate-eval/1": gate_schema.read_gate_eval,
    "gateway/1": gate_schema.read_gateway,
    "lmms/2": lmms_schema.read_lmms,
}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_committed_result_reads_and_came_from_committed_source(path):
    kind = schema.kind_of(path)
    if kind in READERS:
        found = READERS[kind](path)
        assert not found.run.dirty
        assert found.run.commit
    else:
        assert kind.partition("/")[2].isdigit()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_a_page_are_those_of_the_result_files(page):
    text = page.read_text(encoding="utf-8")
    assert table.fill(text, ROOT / "results") == text, f"run: python -m mmroute.bench.table {page.name}"


def test_the_page_of_all_results_is_what_the_files_say():
    page = ROOT / "results" / "README.md"
    said = page.read_text(encoding="utf-8") if page.exists() else None
    assert said in (None, report.page(ROOT / "results")), "run: python -m mmroute.bench.report results"
