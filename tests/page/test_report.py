import base64
import dataclasses
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile

from medalign_jax.evaluate.results import Result
from medalign_jax.evaluate.statistics import Interval
from medalign_jax.evaluate.tables import Table
from medalign_jax.page import figures as report_figures
from medalign_jax.page import media as report_media
from medalign_jax.page import report
from medalign_jax.page.recordings import Example, Response, Sound
from medalign_jax.page.report import Nearest, Recording, ReportData, UnusableRow

HOSTILE = "<script>alert('x')</script> \"&\" </svg><img src=http://evil.example/a> \ud800"
VOID = {"meta", "img", "br", "wbr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.texts.append(data)

    def find(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def interval(value, low, high):
    return Interval(value, low, high, 0.95, 2000)


def tone(seconds=1.0):
    return np.sin(np.arange(int(8000 * seconds)) * 0.2).astype(np.float32) * 0.01


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    labels = [f"class {i} {HOSTILE}" for i in range(3)] * 4
    points = rng.standard_normal((12, 2))
    return ReportData(
        title=HOSTILE,
        headline=HOSTILE,
        summary=HOSTILE,
        facts=[("teacher " + HOSTILE, HOSTILE)],
        scores=[
            report_figures.Scores(
                HOSTILE,
                (
                    report_figures.Score("before", 0.91, 0.88, 0.93, "before"),
                    report_figures.Score(HOSTILE, 0.95, None, None, HOSTILE),
                ),
                HOSTILE,
                "higher",
                0.5,
                HOSTILE,
                HOSTILE,
            )
        ],
        curves=[
            report_figures.Curves(
                HOSTILE,
                (report_figures.Series(HOSTILE, np.arange(5), np.array([3, 2, np.nan, 1, 1.0])),),
                HOSTILE,
                HOSTILE,
            )
        ],
        maps=report_figures.Maps(
            [report_figures.MapPanel(HOSTILE, points, (0.5, 0.2))] * 2,
            labels, [HOSTILE] * 12, {3: 0},
        ),
        map_note=HOSTILE,
        sounds=[Sound(HOSTILE, tone(), 8000)],
        confusions=[
            report_figures.Confusion(HOSTILE, tuple(labels[:3]), np.eye(3, dtype=int) * 4, HOSTILE)
        ],
        recordings=[
            Recording(HOSTILE, tone(), 8000, HOSTILE, HOSTILE, HOSTILE, rng.random((9, 6)),
                      (Nearest(HOSTILE, 0.5, True), Nearest("other", 0.1)))
        ],
        results=[
            Result(HOSTILE, "d", "k", "s", "auroc", 0.912, 0.9, 0.95, 40, 149, (0, 1), HOSTILE),
            Result("t", "d", "k", "s", "mae", 12.345, None, None, 40, 149, (0,), "why"),
        ],
        unusable=[UnusableRow(17, HOSTILE, HOSTILE), UnusableRow(None, "a.wav", "missing")],
        limits=[HOSTILE],
    )  # fmt: skip


def scripts_of(text):
    """What runs, and the data that it reads."""
    data = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', text, re.S)
    return re.findall(r"<script>(.*?)</script>", text, re.S), json.loads(data[1])


def markup_of(text):
    """The page without what is inside of its scripts."""
    return re.sub(r"(<script[^>]*>).*?(</script>)", r"\1\2", text, flags=re.S)


def test_page_parses_and_nothing_from_data_becomes_markup(data, tmp_path):
    path = tmp_path / "report.html"
    report.write_report(path, data)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.find("script")) == 3, "the data, Plotly and our own"
    assert all(image["src"].startswith("data:image/png") for image in page.find("img"))
    assert text.count("<script") == 3
    assert "alert(&#39;x&#39;)" in text
    shown = "".join(page.texts)
    assert shown.count("<script>alert('x')</script>") > 20


def test_no_label_of_a_figure_holds_a_tag_of_the_data(data):
    _, content = scripts_of(report.render(data))
    allowed = re.compile(r"</?(b|br|extra)>")
    for text in texts_in(content):
        assert "<" not in allowed.sub("", text) and ">" not in allowed.sub("", text), text
    assert any("&lt;script&gt;" in text for text in texts_in(content))


def texts_in(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from texts_in(each)


def test_page_reaches_for_nothing_outside(data):
    text = report.render(data)
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "srcset", "data", "poster", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
        assert not any(name.startswith("on") for name in attributes)
    clean = report.render(ReportData("t", "h", limits=["one"]))
    assert not re.search(r"https?://|@import|url\(", markup_of(clean))


def test_policy_lets_these_scripts_run_and_no_others(data):
    text = report.render(data)
    (policy,) = [m["content"] for m in Page(text).find("meta") if "http-equiv" in m]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    running, _ = scripts_of(text)
    hashes = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in running]
    assert rules["script-src"] == " ".join(f"'sha256-{each}'" for each in hashes)
    assert "unsafe" not in rules["script-src"]


def test_page_without_figures_does_not_carry_plotly():
    text = report.render(ReportData("title", "headline", limits=["one"]))
    assert len(text) < 30_000
    assert len(scripts_of(text)[0]) == 1


def test_page_can_be_read_without_seeing_it(data):
    page = Page(report.render(data))
    plots = [d for d in page.find("div") if d.get("class") == "plot"]
    assert len(plots) == 4  # scores, two maps, curve
    pictures = [*plots, *page.find("svg")]
    assert all(each["role"] == "img" and len(each["aria-label"]) > 10 for each in pictures)
    assert all(image["alt"] for image in page.find("img"))
    assert all(sound["aria-label"] for sound in page.find("audio"))
    assert len(page.find("caption")) == len(page.find("table")) == 3
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.find("a")} <= set(ids)


def test_words_of_the_results_are_explained_and_no_others(data):
    shown = " ".join(Page(report.render(data)).texts)
    assert "0.5 is a coin" in shown and "wrong on average" in shown
    assert "small hidden layer" not in shown and "A minus B" not in shown


@pytest.fixture
def asked(data):
    """The page with tables, and questions that stages answered."""
    sounds = (Sound(HOSTILE, tone(), 8000), Sound("gone.wav", None, problem=HOSTILE))
    responses = (
        Response("before", "", False, "", HOSTILE),
        Response(HOSTILE, "yes", True, f"I think {HOSTILE}\nyes"),
    )
    example = Example(HOSTILE, sounds, HOSTILE, ("yes", HOSTILE), "yes", responses)
    table = Table(HOSTILE, ("Stage", HOSTILE, "#2"), (("before", "1.0", HOSTILE),))
    return dataclasses.replace(
        data, tables=[table], examples=[example, Example("t", (), "free?", (), "blue", ())]
    )


def test_questions_and_answers_are_shown_and_escaped(asked):
    text = report.render(asked)
    page = Page(text)
    assert text.count("<script") == 3
    # The recording, the one sound that there is, and the player of the map.
    assert len(page.find("audio")) == 3
    assert len(page.find("details")) == 1, "a response that is its answer is not shown twice"
    shown = " ".join(page.texts)
    for words in ("✓ right", "✗ wrong", "✓ yes", "no answer", "Right answer", "✓ blue", "#2"):
        assert words in shown, words
    assert {a["href"][1:] for a in page.find("a")} >= {"examples", "outcome"}
    assert all(sound["aria-label"] for sound in page.find("audio"))


def test_lines_of_the_headline_are_paragraphs(data):
    page = Page(report.render(dataclasses.replace(data, headline="one\n\ntwo", summary="a")))
    assert [p.get("class") for p in page.find("p")][:4] == ["over", "headline", "headline",
                                                            "summary"]  # fmt: skip


def test_table_of_uneven_rows_is_refused():
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        Table("t", ("a", "b"), (("x",),))


def test_lines_that_share_a_colour_differ_in_dash():
    count = 4 * report_figures.COLOURS
    looks = {(i % report_figures.COLOURS, report_figures._dash(i)) for i in range(count)}
    assert len(looks) == count


def test_numbers_are_on_the_page(data):
    text = report.render(data)
    shown = " ".join(Page(text).texts) + " ".join(texts_in(scripts_of(text)[1]))
    for text in ("0.910 [0.880, 0.930]", "0.912", "0.900 to 0.950", "12.3", "149", "17"):
        assert text in shown


def test_sections_without_content_are_left_out():
    page = Page(report.render(ReportData("title", "headline")))
    assert page.find("section") == []
    assert "headline" in page.texts


def test_headline_calls_a_change_only_what_the_interval_supports():
    before, after = interval(0.91, 0.88, 0.93), interval(0.94, 0.92, 0.96)
    reference = interval(0.97, 0.95, 0.98)
    better = report.comparison_sentence(
        "the AUROC", before, after, interval(0.03, 0.01, 0.05), reference
    )
    assert better == (
        "The AUROC rose: from 0.910 to 0.940, a difference of +0.030 (paired 95 % interval "
        "+0.010 to +0.050). Fine-tuned with the labels it is 0.970."
    )
    unclear = report.comparison_sentence("x", before, after, interval(0.03, -0.01, 0.05))
    assert "did not change clearly" in unclear
    worse = report.comparison_sentence("x", after, before, interval(-0.03, -0.05, -0.01))
    assert "X fell:" in worse and "Fine-tuned" not in worse
    error = report.comparison_sentence(
        "MAE", interval(3, 2, 4), interval(2, 1, 3), interval(-1, -1.5, -0.5),
        higher_is_better=False,
    )  # fmt: skip
    assert "fell (better)" in error


@pytest.mark.parametrize("rate", [4000, 16_000, 96_000])
def test_audio_survives_the_data_uri(rate):
    time = np.arange(rate) / rate
    wave = (np.sin(2 * np.pi * 150 * time) * 0.01).astype(np.float32)
    kind, content = report_media.audio_uri(wave, rate).split(",", 1)
    assert kind == "data:audio/mpeg;base64"
    back, heard = soundfile.read(io.BytesIO(base64.b64decode(content)))
    assert heard == {4000: 8000, 16_000: 16_000, 96_000: 48_000}[rate]
    middle = back[heard // 4 : heard * 3 // 4]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    loudest = spectrum.argmax() * heard / len(middle)
    assert loudest == pytest.approx(150, abs=3)
    assert np.abs(middle).max() == pytest.approx(0.9, abs=0.02)


def test_long_recordings_are_cut_and_said():
    text = report.render(ReportData("t", "h", recordings=[Recording("r", tone(25), 8000)]))
    assert "25.0 s, first 10 s shown" in text
    uri = re.search(r'src="data:audio/mpeg;base64,([^"]+)"', text).group(1)
    heard = soundfile.info(io.BytesIO(base64.b64decode(uri))).duration
    assert heard == pytest.approx(10, abs=0.15)  # MP3 comes in frames


def test_png_is_read_back_by_another_reader():
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    colours = report_media.palette()
    opened = image.open(io.BytesIO(report_media.png(indices, colours)))
    assert opened.size == (4, 3)
    np.testing.assert_array_equal(np.asarray(opened.convert("RGB")), colours[indices])
    assert np.all(np.diff(colours.astype(float) @ [0.299, 0.587, 0.114]) > -1)


def test_spectrogram_lies_with_time_to_the_right_and_pitch_up():
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    features = np.zeros((5, 3))
    features[4, 0] = 1.0  # last frame, lowest band
    uri = report_media.spectrogram_uri(features)
    opened = image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    levels = np.asarray(opened)
    assert levels.shape == (3, 5)
    assert np.argwhere(levels == 255).tolist() == [[2, 4]]


def test_long_curves_keep_their_spikes():
    y = np.ones(10_000)
    y[5_003], y[7_777] = 9.0, -4.0
    x, kept = report_figures._thinned(report_figures.Series("s", np.arange(10_000), y), False)
    assert len(x) <= 2 * report_figures._BUCKETS + 2
    assert (x[0], x[-1]) == (0, 9_999)
    assert {9.0, -4.0} <= set(kept.tolist())
    assert np.all(np.diff(x) > 0)


@pytest.mark.parametrize(
    "values", [[5.0], [2.0, 2.0], [np.nan, 1.0], [np.nan], [], [1e-9, 2e-9], [-1e6, 1e6]]
)
@pytest.mark.parametrize("log", [False, True])
def test_odd_curves_are_drawn(values, log):
    series = report_figures.Series("s", np.arange(len(values)), np.array(values))
    chart = report_figures.Curves("t", (series,), log_y=log)
    drawn = report_figures.line_chart(chart)
    finite = [v for v in values if np.isfinite(v) and (v > 0 or not log)]
    if not finite:
        assert drawn is None
        assert "No values were logged." in report.render(ReportData("t", "h", curves=[chart]))
        return
    (trace,) = drawn.traces
    assert [v for v in trace["y"] if v is not None] == finite
    assert trace["mode"] == ("lines" if len(finite) > 1 else "markers")


def test_scores_keep_their_intervals_and_say_which_way_is_better():
    scores = (
        report_figures.Score("a", 0.4),
        report_figures.Score("b", 0.9, 0.7, 1.0, "after"),
    )
    chart = report_figures.Scores("t", scores, "AUROC", "higher", 0.5)
    drawn = report_figures.scores_chart(chart)
    first, second, chance = drawn.traces
    assert (first["x"], second["x"], chance["x"]) == ([0.4], [0.9], [0.5])
    assert first["y"] > second["y"], "the first one is on top"
    assert "error_x" not in first
    assert second["error_x"]["array"] == [pytest.approx(0.1)]
    assert second["error_x"]["arrayminus"] == [pytest.approx(0.2)]
    assert drawn.layout["xaxis"]["title"]["text"] == "AUROC (higher is better)"
    assert drawn.layout["shapes"][0]["x0"] == 0.5
    assert "Dotted line: chance, 0.500." in drawn.caption
    error = report_figures.scores_chart(report_figures.Scores("t", scores, "MAE", "lower"))
    assert error.layout["xaxis"]["title"]["text"] == "MAE (lower is better)"
    assert "shapes" not in error.layout and len(error.traces) == 2


def test_maps_share_colours_have_equal_axes_and_keep_what_can_be_heard():
    rng = np.random.default_rng(0)
    labels = ["b", "a"] * 2500
    panels = [report_figures.MapPanel(t, rng.standard_normal((5000, 2))) for t in "xy"]
    maps = report_figures.Maps(panels, labels, heard={4999: 0, 7: 1})
    for panel, drawn in zip(panels, report_figures.scatter_maps(maps), strict=True):
        one, other, rings, chosen = drawn.traces
        assert [one["name"], other["name"]] == ["a", "b"]
        assert one["marker"]["color"] != other["marker"]["color"]
        points = one["customdata"] + other["customdata"]
        assert len(points) <= 2002 and {4999, 7} <= set(points)
        at = dict(zip(one["customdata"], zip(one["x"], one["y"], strict=True), strict=True))
        np.testing.assert_allclose(at[4999], panel.points[4999], atol=1e-4)
        np.testing.assert_allclose(rings["x"], panel.points[[7, 4999], 0], atol=1e-4)
        assert chosen["x"] == []
        assert drawn.layout["yaxis"]["scaleanchor"] == "x"


def test_classes_differ_by_shape_and_colour_and_figures_refuse_bad_input():
    names = [f"{k:02d}" for k in range(40)]
    maps = report_figures.Maps([report_figures.MapPanel("t", np.zeros((40, 2)))], names)
    (drawn,) = report_figures.scatter_maps(maps)
    markers = [trace["marker"] for trace in drawn.traces[:40]]
    assert len({(m["color"], m["symbol"]) for m in markers}) == 40
    with pytest.raises(ValueError, match="2 labels"):
        report_figures.Maps([report_figures.MapPanel("t", np.ones((3, 2)))], ["a", "b"])
    with pytest.raises(ValueError, match="3 labels"):
        report_figures.Maps([report_figures.MapPanel("t", np.full((3, 2), np.nan))], "abc")
    with pytest.raises(ValueError, match="1 names"):
        report_figures.Maps([], ["a", "b"], ["x"])
    with pytest.raises(ValueError, match="counts for 3 classes"):
        report_figures.Confusion("t", ("a", "b", "c"), np.eye(2))
    with pytest.raises(ValueError, match="waveform"):
        report_media.audio_uri(np.array([0.0, np.nan]), 8000)


def test_a_page_of_many_points_and_sounds_is_small():
    rng = np.random.default_rng(0)
    noise = [rng.standard_normal(160_000).astype(np.float32) for _ in range(20)]
    panels = [report_figures.MapPanel(t, rng.standard_normal((2000, 2))) for t in "xy"]
    names = ["a report of some length about the sounds of a heart, heard at the apex"] * 2000
    page = ReportData(
        "t", "h",
        maps=report_figures.Maps(panels, ["a", "b"] * 1000, names, {i: i for i in range(20)}),
        sounds=[Sound(f"{i}.wav", noise[i], 16_000) for i in range(20)],
    )  # fmt: skip
    assert len(report.render(page).encode()) < 3_000_000
