"""The report of a comparison: what the page says, that it needs nothing else, and what it refuses."""

import importlib
import itertools
import json
import math
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from PIL import Image, ImageStat

import hfbridge
from hfbridge.compare.report import draw, panels, summary, write_report
from hfbridge.compare.report.recorded import Recorded, Run, Verdict, read_comparison, slug_of
from hfbridge.compare.report.theme import DARK, LIGHT, MARKER_PATHS, stroke_of
from hfbridge.errors import MissingDependencyError, ReportError
from tests.compare import browser, recorded
from tests.compare.recorded import ACCELERATE, LIGHTNING, NATIVE, ZERO

FIGURES = ["loss", "grad_norm", "learning_rate", "metrics", "differences", "speed", "memory"]
VOID = {"meta", "link", "br", "wbr", "input", "img", "hr"}


class Page(HTMLParser):
    """Elements and texts of a page; fails where elements do not end in the order in which they begin."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "br":
            self.texts.append(" ")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        """What is read, with single spaces."""
        return " ".join("".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of four engines with its report."""
    folder = recorded.write_comparison(tmp_path_factory.mktemp("comparison"))
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(folder / "report.html")


def small(folder: Path, engines: list[str], **other: Any) -> Path:
    """A comparison of a few equal steps."""
    rows = recorded.step_rows(4)
    for engine in engines:
        recorded.write_engine(folder, engine, rows, settings={})
    verdicts = [recorded.verdict(engine, "exact", theirs=engines[0]) for engine in engines[1:]]
    recorded.write_overview(folder, engines, other.pop("verdicts", verdicts), steps=4, **other)
    return folder


def test_the_verdict_stands_on_top_in_a_sentence_and_a_word(page: Page) -> None:
    sentence = (
        "accelerate differs from native from step 17 on, first in the gradient norm; lightning equals native "
        "to the bit; lightning:deepspeed_stage_2 is close to native (differences of at most 3.9e-07)."
    )
    assert f"job.py differs {sentence}" in page.text
    assert "<wbr>" not in page.text
    assert len(page.all("wbr")) > 0
    classes = [attributes.get("class") for attributes in page.all("div")]
    assert "verdict bad" in classes


def test_each_pair_has_its_verdict_with_cause_and_values(page: Page, folder: Path) -> None:
    wrong = json.loads((folder / "comparison.json").read_text())["verdicts"][2]
    for text in (
        "step 17, gradient norm",
        f"{wrong['ours_value']!r} beside {wrong['theirs_value']!r}",
        "gradient norm 0.5",
        "Likely cause: loss scale: a constant factor of 2",
        "Sums over ranks are taken in another order.",
        "Tolerance of a step's loss 1.0e-05",
    ):
        assert text in page.text


def test_the_page_has_every_section_and_figure(page: Page, folder: Path) -> None:
    titles = ["Verdicts", "Curves", "Differences to native", "Speed and memory", "Settings", "Notes"]
    for title in [*titles, "Environment"]:
        assert title in page.texts
    names = {one.get("aria-label", "").split(":")[0].split(" by ")[0] for one in page.all("figure")}
    assert {"Loss", "Gradient norm", "Learning rate", "eval_loss", "eval_accuracy", "eval_f1"} <= names
    assert {"Samples per second", "Median time of a step", "Memory at its fullest", "Memory in MiB"} <= names
    for name in FIGURES:
        with Image.open(folder / f"{name}.png") as image:
            assert image.width >= 1000
            assert len(image.convert("RGB").resize((60, 40)).getcolors(2400) or []) > 10


def test_differences_are_told_by_quantity(page: Page) -> None:
    for text in (
        "equal to the bit at 300 steps",
        "accelerate unequal at 284 of 300 steps, at most 0.5 at step",
    ):
        assert any(text in (one.get("aria-label") or "") for one in page.all("figure"))
    assert "step 17 284 of 300 up to 0.5" in page.text
    assert "equal to the bit" in page.text


def test_speed_memory_and_overhead_are_told(page: Page, folder: Path) -> None:
    costs = {cost.run.engine: cost for cost in summary.costs(read_comparison(folder))}
    assert costs[NATIVE].overhead == 1
    assert costs[ZERO].overhead == pytest.approx(0.235 / 0.2, rel=0.05)
    assert f"{costs[ZERO].overhead:.3f}" in page.text
    assert "(ratio " in page.source
    assert "too few steps" not in page.text
    assert f"{costs[ZERO].throughput:.3f}" in page.text
    assert "512 MiB" in page.text
    # The slow first step counts for nothing.
    assert costs[NATIVE].step_s is not None
    assert costs[NATIVE].step_s[4] < 0.3


def test_a_speed_is_told_of_enough_steps(tmp_path: Path) -> None:
    few = "too few steps for a speed (8; 20 are needed)"
    for steps in (8, 20):
        costs = summary.costs(read_comparison(recorded.write_comparison(tmp_path / str(steps), steps=steps)))
        told = [number for one in costs for number in (one.samples_per_second, one.throughput, one.overhead)]
        assert {number is None for number in told} == {steps == 8}
        assert {one.too_few for one in costs} == {few if steps == 8 else ""}
    page = Page(write_report(tmp_path / "8"))
    assert few in page.text
    assert page.text.count("Too few steps for a speed") == 2  # in both sizes of the figure
    assert "(ratio " not in page.source


def test_ratios_need_enough_steps_of_both(tmp_path: Path) -> None:
    folder = recorded.write_comparison(tmp_path, steps=30)
    path = folder / NATIVE / "steps.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:19]))
    native, lightning, *_ = summary.costs(read_comparison(folder))
    assert (native.samples_per_second, native.throughput, native.overhead) == (None, None, None)
    assert lightning.samples_per_second is not None
    assert (lightning.throughput, lightning.overhead) == (None, None)


def test_pairs_of_one_strategy_are_told_first_and_have_rows(tmp_path: Path) -> None:
    theirs = "native:deepspeed_stage_2"
    near = {"first_step": 1, "quantity": "grad_norm", "largest": {"grad_norm": 4e-6}}
    verdicts = [
        recorded.verdict(LIGHTNING, "exact"),
        recorded.verdict(theirs, "close", **near),
        recorded.verdict(ZERO, "close", **near),
        recorded.verdict(ZERO, "exact", theirs=theirs),
    ]
    page = Page(write_report(small(tmp_path, [NATIVE, LIGHTNING, theirs, ZERO], verdicts=verdicts)))
    assert (
        f"{ZERO} equals {theirs} to the bit; {LIGHTNING} equals native to the bit; {theirs} and {ZERO} are "
        "close to native (differences of at most 4e-06), over 4 steps."
    ) in page.text
    assert f"{ZERO} beside {theirs}" in page.text


def test_settings_that_differ_are_marked_and_the_others_collapsed(page: Page) -> None:
    body, _, rest = page.text.partition("settings that are the same on all engines")
    settings = body[body.rindex("Settings that are not the same") :]
    for text in ("lr_scheduler_type", '"constant_with_warmup"', "strategy", '"deepspeed_stage_2"'):
        assert text in settings
    assert "weight_decay" not in settings
    assert "weight_decay0.01" in rest.replace(" ", "")
    assert page.source.count('class="code other"') == 3  # accelerate's schedule; two strategies beside "ddp"
    assert len(page.all("details")) == 1
    assert "open" not in page.all("details")[0]


def test_notes_are_told_once_with_their_engines(page: Page) -> None:
    assert page.text.count("The model ignores num_items_in_batch") == 1
    assert f"({NATIVE}, {LIGHTNING}, {ZERO})" in page.text


def test_numbers_at_the_axes_keep_their_digits(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 0.66 + step / 1000, "learning_rate": step / 1000} for step in range(1, 6)]
    small(tmp_path, [NATIVE, LIGHTNING])
    for engine in (NATIVE, LIGHTNING):
        (tmp_path / engine / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for engine in (NATIVE, LIGHTNING):
        (tmp_path / engine / "metrics.jsonl").write_text('{"step": 7, "eval_loss": 0.5}')
    page = Page(write_report(tmp_path))
    assert {"0.661", "0.665", "0.001", "0.005"} <= set(page.texts)
    assert page.texts.count("7") == 2  # the only evaluation, in both sizes


def test_the_page_needs_nothing_else(page: Page) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {
        "script",
        "img",
        "iframe",
        "object",
        "embed",
        "video",
        "audio",
        "base",
        "form",
        "image",
    }
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert re.match(r"#|data:,$", attributes.get(name) or "#"), attributes
        assert not [name for name in attributes if name.startswith("on")]
    assert "//" not in page.source
    assert "@import" not in page.source
    assert not re.findall(r"url\((?!#)", page.source)
    assert "default-src 'none'" in page.source


def test_every_reference_inside_the_page_resolves_to_one_element(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    hrefs = {(a.get("href") or a.get("xlink:href") or "#")[1:] for t, a in page.elements if t != "link"}
    used = hrefs | set(re.findall(r"url\(#([^)]+)\)", page.source))
    used |= {a["aria-labelledby"] or "" for _, a in page.elements if "aria-labelledby" in a}
    assert used - {""} <= set(ids)


def test_the_page_can_be_read_aloud(page: Page) -> None:
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    for figure in page.all("figure"):
        assert figure["role"] == "img"
        assert len(figure["aria-label"] or "") > 30
    assert all(svg.get("aria-hidden") == "true" for svg in page.all("svg"))
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))
    # Tables are stacked on a phone, which takes their meaning from them unless roles give it back.
    assert all(table.get("role") == "table" for table in page.all("table"))
    assert all(cell.get("role") == "cell" and cell.get("data-label") for cell in page.all("td"))


def contrast(one: str, other: str) -> float:
    """Contrast of two colours `#rrggbb` as WCAG 2 has it, from 1 to 21."""
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_texts_and_lines_stand_out(theme: dict[str, str]) -> None:
    grounds = ["background", "raised", "band"]
    texts = [(name, ground) for name in ("ink", "muted", "link") for ground in grounds]
    texts += [(tone, f"{tone}-back") for tone in ("good", "fair", "bad")]
    texts += [("ink", f"{tone}-back") for tone in ("good", "fair", "bad")] + [("ink", "marked")]
    for name, ground in texts:
        assert contrast(theme[name], theme[ground]) >= 4.5, (name, ground)
    for number in range(6):
        assert contrast(theme[f"engine-{number}"], theme["background"]) >= 3, number
    assert len(set(theme.values())) == len(theme)
    assert LIGHT.keys() == DARK.keys()


def test_lines_of_equal_curves_differ_in_colour_and_in_dashes_or_width() -> None:
    strokes = [stroke_of(place) for place in range(6)]
    assert len({stroke.name for stroke in strokes}) == 6
    assert len({(stroke.width, stroke.dashes) for stroke in strokes}) == 6
    widths = [stroke.width for stroke in strokes]
    assert widths == sorted(widths, reverse=True)
    assert {stroke_of(place).marker for place in range(12)} == set(MARKER_PATHS)


def test_figures_take_the_colours_of_the_readers_scheme(page: Page) -> None:
    body = page.source.partition("</style>")[2]
    assert not set(re.findall(r"#[0-9a-f]{6}\b", body))
    for place in range(4):
        assert f"stroke: var(--engine-{place})" in body


def test_the_same_files_give_the_same_report_whatever_matplotlib_was_told(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with matplotlib.rc_context({"font.size": 31, "text.usetex": True, "svg.fonttype": "path"}):
        settings = matplotlib.rcParams.copy()
        write_report(folder)
        assert matplotlib.rcParams.copy() == settings
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


HOSTILE = [
    "native",
    "<script>alert(1)</script>",
    "$\\frac{x$",
    '"><img src=x onerror=alert(2)>',
    "_hidden 模型 é\n\x00",
    "../../outside",
    "\ud800 half",
]


def test_texts_of_the_files_stay_texts(tmp_path: Path) -> None:
    attack = "</style></svg><script>alert(3)</script>{{ 7*7 }}${x}"
    verdicts = [
        recorded.verdict(name, "differs", first_step=2, quantity=attack, why=attack, cause=attack)
        for name in HOSTILE[1:]
    ]
    settings = [{"name": attack, "values": {name: {"x": [attack, name]} for name in HOSTILE}}]
    folder = tmp_path / "out"
    rows = recorded.step_rows(4)
    for name in HOSTILE:
        home = folder / "x"
        recorded.write_engine(folder, "x", rows, settings={})
        (home / "metrics.jsonl").write_text(json.dumps({"step": 4, f"eval_{attack}": 0.5}))
        done = json.loads((home / "done.json").read_text())
        (home / "done.json").write_text(json.dumps({**done, "notes": [attack, name]}))
        home.rename(folder / slug_of(name))
    environment = {"cpu": attack, "versions": {attack: attack}}
    recorded.write_overview(
        folder,
        HOSTILE,
        verdicts,
        steps=4,
        job=attack,
        environment=environment,
        date=attack,
        settings=settings,
    )
    page = Page(write_report(folder))
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert attack in page.text
    assert "alert(3)" in page.text
    assert "{{ 7*7 }}" in page.text
    assert "<script" not in page.source
    assert not (tmp_path.parent / "outside").exists()


@pytest.mark.long
@pytest.mark.slow
def test_thousands_of_steps_make_no_larger_page(tmp_path: Path) -> None:
    sizes = []
    for steps in (1_000, 4_000):
        folder = recorded.write_comparison(tmp_path / str(steps), steps=steps)
        path = write_report(folder)
        sizes.append(path.stat().st_size)
        assert "thinned to about 400 points" in path.read_text(encoding="utf-8")
    assert sizes[1] < 1.1 * sizes[0]
    assert sizes[1] < 900_000


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            {"first_step": 0, "quantity": "parameters"},
            "differs from a before the first step, first in the weights",
        ),
        (
            {"first_step": 1200, "quantity": "eval_f1"},
            "differs from a from step 1,200 on, first in the eval_f1",
        ),
        ({"quantity": "settings"}, "differs from a in the settings"),
        ({}, "differs from a"),
        ({"grade": "exact"}, "equals a to the bit, over 300 steps"),
        (
            {"grade": "close", "largest": {"loss": 0.0, "x": 1e-6}},
            "is close to a (differences of at most 1e-06), over 300 steps",
        ),
        ({"grade": "same trajectory"}, "follows a's trajectory, over 300 steps"),
        ({"grade": "failed"}, "failed"),
    ],
)
def test_a_verdict_becomes_a_sentence(other: dict[str, Any], sentence: str) -> None:
    verdict = Verdict(**{"theirs": "a", "ours": "b", "grade": "differs", **other})
    done = None if verdict.grade == "failed" else {}
    runs = [Run("a", [], {}, [], {}, None), Run("b", [], {}, [], done, None)]
    assert summary.headline(Recorded("job", 1, 300, "", {}, [], [verdict], runs)) == f"b {sentence}."


def test_thinning_keeps_spikes_and_ends() -> None:
    steps = list(range(1, 5001))
    values = [math.sin(step / 300) for step in steps]
    values[3210], values[17] = 50.0, -50.0
    kept_steps, kept = summary.thin(steps, values, 400)
    assert len(kept) <= 400
    assert {50.0, -50.0} <= set(kept)
    assert (kept_steps[0], kept_steps[-1]) == (1, 5000)
    assert kept_steps == sorted(set(kept_steps))
    assert all(values[step - 1] == value for step, value in zip(kept_steps, kept, strict=True))
    assert summary.thin(steps[:400], values[:400], 400) == (steps[:400], values[:400])


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        (1.0, 1.0, 0.0),
        (0.0, -0.0, 0.0),
        (math.nan, math.nan, 0.0),
        (math.inf, math.inf, 0.0),
        (math.nan, 1.0, math.inf),
        (2.0, 1.0, 0.5),
        (1.0, 2.0, 0.5),
        (0.0, 1e-30, 1.0),
        (-1.0, 1.0, 2.0),
        (None, 1.0, math.inf),
        (None, None, 0.0),
    ],
)
def test_relative_differences(theirs: float | None, ours: float | None, expected: float) -> None:
    assert summary.relative_difference(theirs, ours) == expected


def test_all_equal_is_said_so(tmp_path: Path) -> None:
    page = Page(write_report(small(tmp_path, [NATIVE, LIGHTNING, ACCELERATE])))
    assert "exact lightning and accelerate equal native to the bit, over 4 steps." in page.text
    assert any(one.get("class") == "verdict good" for one in page.all("div"))
    assert "No difference at any step." in page.text


def test_a_failed_engine_is_told_with_its_last_lines(tmp_path: Path) -> None:
    failed = recorded.verdict(ZERO, "failed", why="It ended with exit code 1.")
    small(tmp_path, [NATIVE, ZERO, LIGHTNING], verdicts=[failed, recorded.verdict(LIGHTNING, "exact")])
    home = tmp_path / recorded.slug(ZERO)
    (home / "done.json").unlink()
    (home / "metrics.jsonl").unlink()
    (home / "failed.txt").write_text("RuntimeError: <out of memory>")
    lines = (home / "steps.jsonl").read_text().splitlines(keepends=True)
    (home / "steps.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    page = Page(write_report(tmp_path))
    assert f"{ZERO} failed; {LIGHTNING} equals native to the bit." in page.text
    assert f"{ZERO} failed after step 2" in page.text
    assert "RuntimeError: <out of memory>" in page.text
    assert f"All that it has written is in {recorded.slug(ZERO)}/output.txt, beside this page." in page.text


def test_a_failed_engine_may_have_left_nothing(tmp_path: Path) -> None:
    small(tmp_path, [NATIVE, LIGHTNING], verdicts=[recorded.verdict(LIGHTNING, "failed")])
    for path in (tmp_path / LIGHTNING).iterdir():
        path.unlink()
    assert "Its last lines were not kept." in Page(write_report(tmp_path)).text


def test_a_failed_reference_leaves_a_report(tmp_path: Path) -> None:
    small(
        tmp_path, [NATIVE, LIGHTNING], verdicts=[recorded.verdict(LIGHTNING, "failed", why="native failed.")]
    )
    home = tmp_path / NATIVE
    for path in home.iterdir():
        path.unlink()
    (home / "failed.txt").write_text("no such model")
    page = Page(write_report(tmp_path))
    assert "native failed." in page.text
    assert "no such model" in page.text


def test_what_was_not_recorded_is_said_so(tmp_path: Path) -> None:
    small(tmp_path, [NATIVE, LIGHTNING], environment=None, settings=None, verdicts=[])
    for engine in (NATIVE, LIGHTNING):
        (tmp_path / engine / "metrics.jsonl").unlink()
        (tmp_path / engine / "done.json").write_text("{}")
        (tmp_path / engine / "steps.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": NaN}\n')
    page = Page(write_report(tmp_path))
    for text in (
        "there is nothing to compare it with",
        "No evaluation was recorded",
        "Nothing was recorded.",
    ):
        assert text in page.text
    assert "No settings were recorded." in page.text


def test_many_engines_and_metrics_find_a_place(tmp_path: Path) -> None:
    engines = [NATIVE, *(f"lightning:strategy_{number}" for number in range(8))]
    small(tmp_path, engines)
    row = {"step": 4, **{f"eval_m{number}": number for number in range(20)}}
    (tmp_path / NATIVE / "metrics.jsonl").write_text(json.dumps(row))
    page = Page(write_report(tmp_path))
    assert "8 engines equal native to the bit" in page.text
    assert "Not drawn: eval_m11, eval_m12," in page.text
    assert len([one for one in page.all("figure") if "eval_" in (one["aria-label"] or "")]) == 12


def test_other_weights_of_the_same_norm_are_not_drawn_as_equal(tmp_path: Path) -> None:
    small(tmp_path, [NATIVE, LIGHTNING])
    path = tmp_path / LIGHTNING / "steps.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "parameters": f"other {row['step']}"}) + "\n" for row in rows))
    found = read_comparison(tmp_path)
    figures = {figure.name: figure for figure in panels.figures(found, summary.costs(found))}
    norms = figures["differences"].panels[-1]
    assert isinstance(norms, panels.Distances)
    assert norms.curves == []
    agreement = {row.quantity: row.first_step for row in summary.agreement(*found.runs)}
    assert (agreement["parameters"], agreement["parameter_norm"]) == (1, None)


def overwrite(name: str, text: str | None) -> Any:
    def change(folder: Path) -> None:
        path = folder / name
        if text is None:
            path.unlink()
        else:
            path.write_text(text)

    return change


DAMAGED = [
    ("comparison.json", None, r"comparison\.json +is missing; run `hfbridge compare` again"),
    ("comparison.json", "{", r"comparison\.json +is damaged \(Expecting"),
    ("comparison.json", "[" * 100_000, r"comparison\.json +is damaged \("),
    ("comparison.json", "[]", "it holds no JSON object"),
    ("comparison.json", '{"schema": 2}', "schema = 2 +this version reads schema 1"),
    (
        "comparison.json",
        '{"schema": 1, "engines": ["a", "a"], "job": 3, "ranks": true}',
        "(?s)job = 3.*different",
    ),
    (
        "comparison.json",
        '{"schema":1,"engines":["a"],"job":"j","ranks":1,"verdicts":[{"grade":"good"}]}',
        "verdicts =",
    ),
    (
        "lightning/done.json",
        None,
        r"lightning/done\.json +is missing, and lightning is not known to have failed",
    ),
    ("lightning/done.json", '{"notes": 7}', "notes has to be a list of texts"),
    ("lightning/steps.jsonl", '{"step": 1, "loss": ' + "9" * 400 + "}", r"loss =\s+9+\s+has to be a number"),
    ("lightning/done.json", "nope", r"lightning/done\.json +is damaged"),
    (
        "lightning/steps.jsonl",
        None,
        r"lightning/steps\.jsonl +is missing; delete lightning/done\.json and run",
    ),
    ("lightning/steps.jsonl", "", r"lightning/steps\.jsonl +is empty"),
    ("lightning/steps.jsonl", '{"step": 1}\n{"st', r"lightning/steps\.jsonl, line 2 +is damaged"),
    ("lightning/steps.jsonl", '{"step": 1}\n7\n', r"line 2 +is damaged \(no JSON object\)"),
    (
        "lightning/steps.jsonl",
        '{"step": 2}\n{"step": 2}\n',
        r"line 2 +step = 2 has to be greater than the one before",
    ),
    ("lightning/steps.jsonl", '{"step": 1, "loss": "low"}\n', "line 1 +loss = 'low' has to be a number"),
    ("lightning/steps.jsonl", '{"step": 1, "samples": 7}\n', "line 1 +samples = 7 has to be a text"),
    ("lightning/metrics.jsonl", '{"eval_loss": 1}\n', r"metrics\.jsonl, line 1 +step = None"),
]


@pytest.mark.parametrize(("name", "text", "message"), DAMAGED)
def test_a_missing_or_damaged_file_is_named_with_the_cure(
    name: str, text: str | None, message: str, tmp_path: Path
) -> None:
    small(tmp_path, [NATIVE, LIGHTNING])
    overwrite(name, text)(tmp_path)
    with pytest.raises(ReportError, match=message) as caught:
        write_report(tmp_path)
    assert "cannot be shown; nothing was written." in str(caught.value)
    assert not list(tmp_path.glob("*.png"))
    assert not (tmp_path / "report.html").exists()


def test_all_damaged_files_are_named_at_once(tmp_path: Path) -> None:
    small(tmp_path, [NATIVE, LIGHTNING])
    overwrite("native/steps.jsonl", "{")(tmp_path)
    overwrite("lightning/done.json", "{")(tmp_path)
    with pytest.raises(ReportError) as caught:
        write_report(tmp_path)
    assert len(caught.value.problems) == 2


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"no folder; give the folder that `hfbridge compare --out` wrote"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_told_before_anything_is_written(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(tmp_path, [NATIVE, LIGHTNING])
    real = importlib.import_module

    def without(name: str, *arguments: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(name=name)
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingDependencyError, match=r'pip install "hfbridge\[report\]"'):
        write_report(tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_values_are_on_a_log_scale_where_they_span_powers_of_ten(tmp_path: Path) -> None:
    small(tmp_path, [NATIVE, LIGHTNING])
    rows = [{"step": step, "loss": 10.0**-step, "grad_norm": 1.0} for step in range(1, 9)]
    for engine in (NATIVE, LIGHTNING):
        (tmp_path / engine / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(tmp_path))
    assert "Loss (log scale)" in page.texts
    assert "Gradient norm" in page.texts


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (1500, "1,500"), (5e-5, "5e-5"), (2.5e7, "2.5e7"), (-0.5, "-0.5")],
)
def test_numbers_at_axes(value: float, text: str) -> None:
    assert draw.number_as_text(value) == text


def test_the_template_is_shipped() -> None:
    package = Path(hfbridge.__file__).parent
    project = tomllib.loads((package.parent / "pyproject.toml").read_text(encoding="utf-8"))
    shipped = project["tool"]["setuptools"]["package-data"]["hfbridge"]
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert found == set(shipped)


@pytest.fixture(scope="module")
def chromium() -> str:
    found = browser.find_browser()
    if found is None:
        pytest.skip(f"no browser to look at the report with: none of {', '.join(browser.NAMES)} is installed")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_report_in_light_and_dark(
    chromium: str, folder: Path, tmp_path: Path, width: int
) -> None:
    means = {}
    for scheme, theme in (("light", LIGHT), ("dark", DARK)):
        picture = tmp_path / f"{scheme}.png"
        done = browser.run(
            chromium,
            tmp_path / f"home-{scheme}",
            folder / "report.html",
            f"--blink-settings=preferredColorScheme={browser.SCHEMES[scheme]}",
            f"--screenshot={picture}",
            f"--window-size={width},5000",
        )
        assert not browser.console(done)
        with Image.open(picture) as opened:
            image = opened.convert("RGB")
        assert image.size == (width, 5000)
        colours = {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in image.getcolors(2**24)}
        # Not blank, and the figures are drawn in the colours of the scheme.
        assert {theme["background"], theme["ink"], theme["bad-back"], theme["grid"]} <= colours
        assert {theme[f"engine-{number}"] for number in range(4)} <= colours
        assert len(colours) > 200
        means[scheme] = ImageStat.Stat(image.convert("L")).mean[0]
    assert means["light"] > 200
    assert means["dark"] < 70


@pytest.fixture(scope="module")
def long_names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison whose names and values have no place to break."""
    name = "x" * 200
    settings = [{"name": name, "values": {NATIVE: name, name: [name]}}]
    verdict = recorded.verdict(
        name, "differs", first_step=2, quantity=name, ours_value=name, why=name, cause=name
    )
    return small(
        tmp_path_factory.mktemp("long"),
        [NATIVE, name],
        verdicts=[verdict],
        settings=settings,
        environment={name: name},
        job=name,
    )


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_long_names_make_no_page_wider(chromium: str, long_names: Path, tmp_path: Path, width: int) -> None:
    found = browser.measure(chromium, tmp_path / "home", write_report(long_names), width)
    assert (found["scroll"], found["wide"]) == (width, [])


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 1001, 561, 390])
def test_nothing_is_wider_than_the_screen(chromium: str, folder: Path, tmp_path: Path, width: int) -> None:
    found = browser.measure(chromium, tmp_path / "home", folder / "report.html", width)
    assert found["scroll"] == width
    assert found["wide"] == []
    assert found["figures"] == 14  # each in one of its two sizes
    # Figures are shown about as large as they were drawn, so that their texts can be read.
    assert found["narrowest"] > 0.85
