"""The report says what the files say, and needs nothing else: no network, no scripts, no particular stage."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_convert
from jinja2 import UndefinedError

from specflow import files
from specflow.bench.statistics.records import BASELINE, DRAFT, Record
from specflow.config_bench import DynamicTree, StaticTree
from specflow.errors import UserError
from specflow.pages.page import VEGA_LITE, environment
from specflow.paths import Paths
from specflow.report.stage import run_report
from specflow.results.schema import Divergence, Summary, family_summary
from tests import ROOT
from tests.measurements import K, make_records, make_served, make_summary, tuning, write_family
from tests.results import IDENTITY, changed, summary_from

NO_PARAMS: Any = None
"""The report reads none."""
MOST_BYTES = 1_500_000
CHARTS = 13
"""Of a family with everything that write_family measures."""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What a browser without scripts shows of a page, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.anchors: list[str] = []
        self.ids: list[str] = []
        self.charts: list[dict[str, str]] = []
        self.specs: list[dict[str, Any]] = []
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self._hidden = 0
        self.feed(text)
        self.text = _plain(" ".join(" ".join(self.words).split()))

    def handle_starttag(self, tag: str, found: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in found}
        if tag == "a":
            self.anchors.append(attributes.get("href", ""))
        else:
            self.loads += [attributes[name] for name in ("src", "href", "xlink:href", "data") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if attributes.get("class") == "chart":
            self.charts.append(attributes)
        if tag in ("script", "style", "svg"):
            self._hidden += 1
        self._open.append(tag + ":" + attributes.get("type", ""))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style", "svg"):
            self._hidden -= 1
        while self._open and self._open.pop().split(":")[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script:application/json":
            self.specs.append(json.loads(data))
        if not self._hidden:
            self.words.append(data)
            if self.tables and {"td:", "th:"} & set(self._open):
                self.tables[-1][-1][-1] += data

    def row(self, *start: str) -> list[str]:
        """The first row of any table that starts with these cells."""
        rows = [[_plain(cell) for cell in row] for table in self.tables for row in table]
        return next(row for row in rows if row[: len(start)] == list(start))


def _plain(text: str) -> str:
    return text.replace("\N{MULTIPLICATION SIGN}", "x")


def text_of(paths: Paths, name: str) -> str:
    return (paths.report / name).read_text(encoding="utf-8")


def other(name: str) -> Paths:
    return Paths(root=Path(), family=name, cache=Path())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """A family with everything, and its report."""
    root = tmp_path_factory.mktemp("report")
    made = Paths(root=root, family="tiny", cache=root / "cache")
    write_family(made)
    run_report(NO_PARAMS, {"tiny": made})
    return made


@pytest.fixture(scope="module")
def summary(tiny: Paths) -> Summary:
    return family_summary(tiny)


@pytest.fixture(scope="module")
def page(tiny: Paths) -> Page:
    return Page(text_of(tiny, "tiny.html"))


def write_small(paths: Paths, **changes: Any) -> Summary:
    """A sampled benchmark of the two sides alone: nothing optional measured, no training, data or records on disk."""
    records = [record for record in make_records() if record.engine in (BASELINE, DRAFT)]
    identity = changed(IDENTITY, cpu="Some CPU <test>")
    small = summary_from(
        records, num_speculative_tokens=K, family=paths.family, identity=identity, settings={"temperature": 1.0}
    )
    small = changed(small, **changes)
    files.write_json(paths.bench / "summary.json", small.to_json())
    files.write_json(paths.target, {"architecture": "LlamaForCausalLM", "num_parameters": 134515008})
    return small


def test_the_verdict_comes_first_and_every_number_stands_in_a_table(page: Page, summary: Summary, tiny: Paths) -> None:
    verdict = " ".join(summary.verdict.split())
    assert verdict in page.text and page.text.index(verdict) < page.text.index("Results")
    for name, result in {**summary.sets, "all sets": summary.overall}.items():
        low, high = result.speedup_ci
        cells = page.row(name)
        expected = [f"{result.speedup:.2f}x", f"{low:.2f} to {high:.2f}", f"{result.speedup_mean_of_ratios:.2f}"]
        assert cells[1:5] == [*expected, f"{result.acceptance_length:.2f}"]
        assert cells[6:9] == ["yes", f"{result.tok_s:.1f}", f"{result.baseline_tok_s:.1f}"]
        rates = [f"{rate:.2f}" for rate in result.survival]
        assert any(row[0] == name and row[1:4] == rates for table in page.tables for row in table)
    coding = summary.sets["human_eval"].by_category["coding"]
    assert page.row("coding")[1:4] == ["human_eval", f"{coding.acceptance_length:.2f}", f"{coding.speedup:.2f}x"]
    assert page.row("3, taken") == ["3, taken", "1.27x", "2.06", "60.0"]
    assert page.row("t_verify, ms")[1:] == ["20.1", "20.8", "23.5", "30.2", "43.9"]
    assert page.row("4", "1.14x") == ["4", "1.14x", "197.9", "174.1", "2.07", "93.0 %"]
    assert page.row("human_eval", "tests")[2:] == ["55.6 %", "66.7 %", "-11.1", "-25.0 to +0.0", "0, 1", "9"]
    assert "4 questions of mt_bench are over the context" in page.text
    for repeat in summary.drift.by_repeat:
        assert page.row(f"{repeat.repeat + 1}", f"{repeat.speedup:.2f}x")[2] == f"{repeat.tok_s:.1f}"
    markdown = text_of(tiny, "tiny.md")
    overall = summary.overall
    for text in (summary.verdict, f"| {overall.speedup:.2f} |", f"{overall.acceptance_length:.2f}", "17 671"):
        assert text in markdown, text


def test_reference_rows_say_what_a_step_costs(page: Page, summary: Summary) -> None:
    """At batch 1 a step takes acceptance length / decode speedup plain steps: here 23.5 ms + 0.1 of 20.1 ms."""
    right, wrong = page.row("always right"), page.row("always wrong")
    assert [right[2], right[5]] == ["4.00", "yes"] and wrong[2] == "1.00"
    references = summary.overall.references
    assert right[1] == f"{references['oracle'].speedup:.2f}x"
    assert float(right[3]) == pytest.approx(23.6 / 20.1, rel=0.05)
    assert float(page.row("the draft")[3]) == pytest.approx((23.6 + 3 * 1.2) / 20.1, rel=0.05)


def test_latency_percentiles_are_those_of_the_records(page: Page) -> None:
    draft = [record for record in make_records() if record.engine == "draft"]
    for what, value in {
        "per token": lambda r: r.decode_s / (len(r.token_ids) - 1),
        "first token": lambda r: r.prefill_s,
        "end to end": lambda r: r.prefill_s + r.decode_s,
    }.items():
        expected = np.percentile([1e3 * value(record) for record in draft], [50, 90, 99])
        assert page.row(f"{what}, with the draft")[1:] == [f"{ms:,.1f}".replace(",", " ") for ms in expected]


def test_training_is_set_against_the_benchmark(page: Page, summary: Summary) -> None:
    """Best evaluation: 1 + 0.83 * (1 - 1/16), and 1 + 0.5 + 0.22 + 0.09 over K = 3."""
    measured = summary.sets["heldout"].acceptance_length
    for text in ("step 300", "1.78", "1.81", f"{measured:.2f}", f"{100 * (measured / 1.81 - 1):+.1f} %"):
        assert text in page.text, text


@pytest.mark.parametrize("name", ["tiny.html", "report.html"])
def test_a_page_loads_nothing_and_fits(tiny: Paths, name: str) -> None:
    text = text_of(tiny, name)
    found = Page(text)
    assert found.loads == [] and "@import" not in text and "url(http" not in text
    assert not any(anchor.startswith(("http", "//")) for anchor in found.anchors)
    assert not any("url" in json.dumps(spec.get("data", {})) for spec in found.specs)
    assert len(text.encode()) < MOST_BYTES


def test_charts_have_labels_and_stand_without_scripts(page: Page, tiny: Paths) -> None:
    assert len(page.charts) == len(page.specs) == CHARTS
    labels = [chart["aria-label"] for chart in page.charts]
    assert all(chart["role"] == "img" for chart in page.charts) and len(set(labels)) == CHARTS
    text = text_of(tiny, "tiny.html")
    assert text.count('<svg class="drawn"') == CHARTS and "currentColor" in text
    assert len(page.ids) == len(set(page.ids))


def test_charts_are_drawn_from_the_summary(page: Page, summary: Summary) -> None:
    specs = {c["aria-label"].split(".")[0]: spec for c, spec in zip(page.charts, page.specs, strict=True)}

    def values(title: str) -> list[dict[str, Any]]:
        return [row for data in _datasets(specs[title]) for row in data]

    speeds = {(row["name"], row["engine"]): row for row in values("Speedup by prompt set") if "name" in row}
    for name, result in summary.sets.items():
        row = speeds[name, "with the draft"]
        assert [row["value"], row["low"], row["high"]] == [result.speedup, *result.speedup_ci]
        assert speeds[name, "n-gram lookup"]["value"] == result.references["lookup"].speedup
    curves = [row for row in values("Survival by position") if row.get("series") == "mt_bench"]
    assert {row["x"]: row["y"] for row in curves} == dict(enumerate(summary.sets["mt_bench"].survival, 1))
    parts = {row["part"]: row["value"] for row in values("Time per token") if "part" in row}
    cost = summary.cost
    step_ms = cost.t_draft_ms + cost.t_verify_ms
    assert parts["drafting"] + parts["verifying"] == pytest.approx(step_ms / summary.overall.acceptance_length)
    assert parts["plain step"] == cost.t_target_ms


def test_legends_turn_series_on_and_off(page: Page) -> None:
    """Vega-Lite takes a legend from a chart's first layer: bound to another one it would be a picture only."""
    several = 0
    for spec in page.specs:
        legends = vl_convert.vegalite_to_vega(spec, vl_version=VEGA_LITE).get("legends", [])
        if "params" in json.dumps(spec):
            several += 1
            assert any(legend["encode"]["symbols"].get("interactive") for legend in legends), json.dumps(spec)[:300]
    assert several == 6


def _datasets(spec: Any) -> list[list[dict[str, Any]]]:
    if isinstance(spec, list):
        return [rows for part in spec for rows in _datasets(part)]
    if not isinstance(spec, dict):
        return []
    own = [spec["data"]["values"]] if "values" in spec.get("data", {}) else []
    own += list(spec.get("datasets", {}).values())
    return own + [rows for key, part in spec.items() if key not in ("data", "datasets") for rows in _datasets(part)]


def test_raw_files_are_linked_relative_to_the_report(tiny: Paths, page: Page) -> None:
    links = [anchor for anchor in page.anchors if not anchor.startswith("#")]
    assert {"../artifacts/tiny/bench/summary.json", "../artifacts/tiny/bench/records.jsonl", "report.html"} <= set(
        links
    )
    assert all((tiny.report / link).exists() for link in links)


def test_sections_that_are_linked_exist(page: Page) -> None:
    assert {anchor[1:] for anchor in page.anchors if anchor.startswith("#")} <= set(page.ids)


def test_families_have_pages_of_their_own_and_one_across_them(paths: Paths) -> None:
    made = {"tiny": write_family(paths), "wide": write_family(other("wide"), edge=0.15)}
    run_report(NO_PARAMS, {"tiny": paths, "wide": other("wide")})
    assert sorted(file.name for file in paths.report.iterdir()) == [
        *("report.html", "report.md", "tiny.html", "tiny.md", "wide.html", "wide.md")
    ]
    found = Page(text_of(paths, "report.html"))
    for name, summary in made.items():
        overall = summary.overall
        assert found.row(name, "pays")[2] == f"{overall.speedup:.2f}x" and summary.verdict in found.text
        assert found.row(name, "mt_bench")[4] == f"{summary.sets['mt_bench'].acceptance_length:.2f}"
        assert f"{name}.html" in found.anchors
        assert summary.verdict in text_of(paths, "report.md")
        own = Page(text_of(paths, f"{name}.html"))
        assert own.row("all sets")[1] == f"{overall.speedup:.2f}x"
        assert all(f"artifacts/{name}/" in anchor for anchor in own.anchors if anchor.startswith("../"))
    assert made["tiny"].verdict not in Page(text_of(paths, "wide.html")).text
    assert "Not the same" not in found.text


def test_unlike_conditions_are_said(paths: Paths) -> None:
    write_small(paths)
    write_small(other("wide"), identity={"device": "H100"})
    run_report(NO_PARAMS, {"tiny": paths, "wide": other("wide")})
    assert "Not the same machine (tiny: Some CPU <test>" in Page(text_of(paths, "report.html")).text


def test_a_family_may_not_take_the_overviews_name(paths: Paths) -> None:
    with pytest.raises(UserError, match="a family cannot be called 'Report'"):
        run_report(NO_PARAMS, {"Report": other("Report")})
    assert not paths.report.exists()


def test_every_part_of_every_page_is_written_from_the_schema(paths: Paths) -> None:
    """Templates end in an error where they name what is not there: every section is rendered, none of them guards."""
    summary = write_family(paths)
    where = Divergence(set="mt_bench", question_id="q", turn=1, sample=0, repeat=2, position=5, expected=1, got=None)
    lossy = changed(summary.overall, lossless=False, lossless_rate=0.9, first_divergence=where)
    files.write_json(paths.bench / "summary.json", changed(summary, overall=lossy, drift={"most_at_once": 2}).to_json())
    served = make_served()
    files.write_json(paths.bench / "served.json", served.to_json())
    files.write_json(paths.state / "tune" / "tune.json", tuning(str(summary.identity.draft_digest)))
    gpu = {"seconds": 60.0, "gpu_seconds": 60.0, "gpu_joules": 7e3, "gpu_memory_peak_gb": 6.0}
    files.write_json(paths.metrics("sample"), gpu | {"gpu_utilisation_mean": 0.8})
    files.write_json(paths.metrics("export"), {"seconds": 2.0})
    write_small(other("wide"), tree=StaticTree(branches=[[0], [0, 0]]))
    run_report(NO_PARAMS, {"tiny": paths, "wide": other("wide")})
    page = Page(text_of(paths, "tiny.html"))
    titles = [chart["aria-label"].split(".")[0] for chart in page.charts]
    drawn = ("Throughput by concurrency", "Per user against in all", "Time per output token by concurrency")
    assert {*drawn, "Speedup by steps and branches"} <= set(titles)
    for name in ("tiny.html", "tiny.md"):
        text = " ".join(Page(text_of(paths, name)).text.split())
        assert served.verdict in text and "made up too" in text and "50.0 %" in text and "1 of 24" in text, name
    for text in (
        "First divergence: mt_bench/q, turn 1, token 5",
        "heldout/q7 from token 9 on",
        "http://somewhere:8000",
    ):
        assert text in page.text, text
    assert "Up to 2 requests were under way at once" in page.text and "vllm serve --speculative-config" in page.text
    overview = Page(text_of(paths, "report.html"))
    assert "about 1.5" in overview.row("tiny") and "static tree of 2 tokens, 3 deep" in overview.row("wide")


@pytest.mark.parametrize("template", sorted((ROOT / "specflow").rglob("*.j2")), ids=lambda file: file.name)
def test_no_template_asks_whether_a_field_exists(template: Path) -> None:
    """What a schema promises is there; a guard would hide a field that was renamed. Figures are not promised."""
    text = template.read_text(encoding="utf-8").replace("figures.get(", "").replace('coverage.get("eval")', "")
    assert not re.findall(r"\.get\(|is (?:not )?defined|\|\s*default|default=", text)


def test_a_renamed_field_ends_in_an_error(summary: Summary) -> None:
    template = environment().from_string("{% if summary.overall.acceptance_len %}{% endif %}")
    with pytest.raises(UndefinedError, match="acceptance_len"):
        template.render(summary=summary)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw | {"schema_version": 99}, r"summary\.json has schema version 99, this specflow reads 1: run"),
        (lambda raw: {k: v for k, v in raw.items() if k != "schema_version"}, "has no schema version"),
        (lambda raw: raw | {"overall": {**raw["overall"], "speedup": "fast"}}, r"is damaged \(overall\.speedup: "),
        (lambda raw: {k: v for k, v in raw.items() if k != "drift"}, r"is damaged \(drift: Field required\)"),
        (lambda raw: raw | {"speed": 1}, r"is damaged \(speed: Extra inputs"),
        (lambda raw: [raw], "has no schema version"),
    ],
)
def test_another_or_a_damaged_summary_names_the_stage(paths: Paths, damage: Any, message: str) -> None:
    raw = write_small(paths).to_json()
    files.write_json(paths.bench / "summary.json", damage(raw))
    with pytest.raises(UserError, match=message) as caught:
        run_report(NO_PARAMS, {"tiny": paths})
    assert "dvc repro bench@tiny" in str(caught.value) and "\n" not in str(caught.value)
    assert not Path(paths.report).exists()


def test_optional_parts_may_be_missing(paths: Paths) -> None:
    write_small(paths)
    run_report(NO_PARAMS, {"tiny": paths})
    found = Page(text_of(paths, "tiny.html"))
    assert len(found.charts) == 5 and "sampled" in found.text
    for word in ("n-gram", "generate()", "Latency of a request", "What bounds it", "Accuracy"):
        assert word not in found.text, word
    assert {anchor[1:] for anchor in found.anchors if anchor.startswith("#")} <= set(found.ids)
    assert text_of(paths, "tiny.md") and text_of(paths, "report.md")


def test_a_tree_is_named_and_lossy_output_marked(paths: Paths) -> None:
    made = write_small(paths, tree=DynamicTree(total_token=16, depth=3, top_k=4))
    made = changed(made, sets={**made.sets, "mt_bench": changed(made.sets["mt_bench"], lossless=False)})
    files.write_json(paths.bench / "summary.json", made.to_json())
    run_report(NO_PARAMS, {"tiny": paths})
    assert "tree of at most 15 tokens, 3 deep, 4 branches a level" in Page(text_of(paths, "tiny.html")).text
    assert '<td class="bad">NO</td>' in text_of(paths, "tiny.html")


def test_a_tuning_of_this_draft_is_shown_and_of_another_one_is_not(paths: Paths) -> None:
    """A line for each number of branches, the fastest number of draft tokens at each depth; no cut heads."""
    small = write_small(paths)
    write_small(other("wide"))
    digest = str(small.identity.draft_digest)
    files.write_json(paths.state / "tune" / "tune.json", tuning(digest))
    files.write_json(other("wide").state / "tune" / "tune.json", tuning("of another draft"))
    run_report(NO_PARAMS, {"tiny": paths, "wide": other("wide")})
    found = Page(text_of(paths, "tiny.html"))
    assert tuning(digest)["verdict"] in found.text and "../.specflow/tiny/tune/tune.html" in found.anchors
    assert found.row("chain-3") == ["chain-3", "1.38x", "1.30 to 1.47", "2.02", "66.3", "48.0"]
    titles = [chart["aria-label"].split(".")[0] for chart in found.charts]
    rows = [row for data in _datasets(found.specs[titles.index("Speedup by steps and branches")]) for row in data]
    points = sorted({(row["series"], row["x"], row["y"]) for row in rows if "series" in row})
    assert points == [("chain", 3, 1.39), ("chain", 3, 1.41), ("topk 2", 4, 1.33)]
    assert "Tuned" not in Page(text_of(paths, "wide.html")).text


def test_a_side_that_did_not_run_leaves_a_dash(paths: Paths) -> None:
    """`--mode draft` has no target alone: no speedup, and no picture of it."""
    records = [record for record in make_records() if record.engine == "draft"]
    write_small(paths)
    files.write_json(paths.bench / "summary.json", make_summary(records).to_json())
    files.write_jsonl(paths.bench / "records.jsonl", (Record.to_json(record) for record in records))
    run_report(NO_PARAMS, {"tiny": paths})
    found = Page(text_of(paths, "tiny.html"))
    assert found.row("all sets")[1:3] == ["-", "-"] and "No conclusion: the target alone did not run" in found.text


def test_what_the_stages_took(paths: Paths) -> None:
    for where in (paths, other("gpu")):
        write_small(where)
        files.write_json(where.metrics("export"), {"seconds": 2.25})
    files.write_json(paths.metrics("sample"), {"seconds": 1234.56})
    gpu = {"gpu_seconds": 2500.0, "gpu_joules": 750_049.0, "gpu_memory_peak_gb": 61.25, "gpu_utilisation_mean": 0.875}
    files.write_json(other("gpu").metrics("sample"), {"seconds": 1234.56, **gpu})
    run_report(NO_PARAMS, {"tiny": paths, "gpu": other("gpu")})
    found = Page(text_of(paths, "tiny.html"))
    assert "| sample | 1 234.6 |\n| export | 2.2 |\n| all stages | 1 236.8 |\n" in text_of(paths, "tiny.md")
    assert found.row("sample") == ["sample", "1 234.6"] and "GPU-seconds" not in found.text
    rows = "| sample | 1 234.6 | 2 500.0 | 750.0 | 61.2 | 88 % |\n| export | 2.2 | - | - | - | - |\n"
    assert rows in text_of(paths, "gpu.md")
    found = Page(text_of(paths, "gpu.html"))
    assert found.row("all stages") == ["all stages", "1 236.8", "2 500.0", "750.0", "-", "-"]


def test_a_missing_benchmark_names_the_stage(paths: Paths) -> None:
    with pytest.raises(UserError, match="run `dvc repro bench@tiny` first"):
        run_report(NO_PARAMS, {"tiny": paths})
    assert not Path(paths.report).exists()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_charts_come_alive_in_a_browser_without_a_network(tiny: Paths) -> None:
    """Every chart is drawn anew, as wide as its column."""
    assert CHROMIUM is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,2000"]
    flags += ["--virtual-time-budget=20000", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command = [CHROMIUM, *flags, "--dump-dom", (tiny.report / "tiny.html").resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count('<div class="live vega-embed') == CHARTS and 'class="drawn"' not in done.stdout
    widths = [float(width) for width in re.findall(r'class="marks" width="([\d.]+)"', done.stdout)]
    assert len(widths) == CHARTS and all(300 < width < 640 for width in widths)
    assert "SyntaxError" not in done.stderr and "TypeError" not in done.stderr
