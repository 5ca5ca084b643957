import base64
import dataclasses
import io
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
from medalign_jax.page import svg as report_svg
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
        bars=[
            report_figures.Bars(
                HOSTILE,
                (
                    report_figures.Bar("before", 0.91, 0.88, 0.93, "before"),
                    report_figures.Bar(HOSTILE, 0.95, None, None, HOSTILE),
                ),
                HOSTILE,
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
        maps=[report_figures.MapPanel(HOSTILE, points, labels, (0.5, 0.2))] * 2,
        map_note=HOSTILE,
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


def test_page_parses_and_nothing_from_data_becomes_markup(data, tmp_path):
    path = tmp_path / "report.html"
    report.write_report(path, data)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.find("script") == []
    assert all(image["src"].startswith("data:image/png") for image in page.find("img"))
    assert "<script" not in text
    assert "alert(&#x27;x&#x27;)" in text
    shown = "".join(page.texts)
    assert shown.count("<script>alert('x')</script>") > 20


def test_page_reaches_for_nothing_outside(data):
    page = Page(report.render(data))
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "srcset", "data", "poster", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
        assert not any(name.startswith("on") for name in attributes)
    (policy,) = [m["content"] for m in page.find("meta") if "http-equiv" in m]
    assert "default-src 'none'" in policy
    clean = report.render(ReportData("t", "h", bars=[], limits=["one"]))
    assert not re.search(r"https?://|@import|url\(", clean)


def test_page_can_be_read_without_seeing_it(data):
    page = Page(report.render(data))
    figures = [s for s in page.find("svg") if "aria-hidden" not in s]
    assert len(figures) == 6  # bars, two maps, confusion, waveform, curve
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 10 for svg in figures)
    assert all(image["alt"] for image in page.find("img"))
    assert all(sound["aria-label"] for sound in page.find("audio"))
    assert len(page.find("caption")) == len(page.find("table")) == 2
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.find("a")} <= set(ids)


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
    assert page.find("script") == []
    assert "<script" not in text
    assert len(page.find("audio")) == 2  # the recording, and the one sound that there is
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
    shown = " ".join(Page(report.render(data)).texts)
    for text in ("0.910  [0.880, 0.930]", "0.912", "0.900 to 0.950", "12.3", "149", "17"):
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


def test_audio_survives_the_data_uri():
    uri = report_media.audio_uri(tone(), 8000)
    kind, content = uri.split(",", 1)
    assert kind == "data:audio/flac;base64"
    back, rate = soundfile.read(io.BytesIO(base64.b64decode(content)))
    assert rate == 8000
    np.testing.assert_allclose(back, tone() * 0.9 / np.abs(tone()).max(), atol=1e-4)


def test_long_recordings_are_cut_and_said():
    text = report.render(ReportData("t", "h", recordings=[Recording("r", tone(25), 8000)]))
    assert "25.0 s, first 20 s shown" in text
    uri = re.search(r'src="data:audio/flac;base64,([^"]+)"', text).group(1)
    assert soundfile.info(io.BytesIO(base64.b64decode(uri))).duration == 20


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
    svg = report_figures.line_chart(report_figures.Curves("t", (series,), log_y=log))
    Page(svg)
    assert "nan" not in svg


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 1e6), (1e-7, 3e-7), (0.91, 0.97)])
def test_ticks_are_round_and_inside(low, high):
    values = report_svg.ticks(low, high)
    assert 2 <= len(values) <= 11
    assert all(low - 1e-9 <= v <= high + 1e-9 for v in values)
    steps = np.diff(values)
    np.testing.assert_allclose(steps, steps[0])
    assert float(f"{steps[0]:.0e}") == pytest.approx(steps[0])


def test_bars_lie_in_proportion_from_their_origin():
    bars = (report_figures.Bar("a", 0.6), report_figures.Bar("b", 0.9, 0.8, 1.0, "after"))
    svg = report_figures.interval_bars(report_figures.Bars("t", bars, "AUROC", 0.5, "chance"))
    widths = [float(w) for w in re.findall(r'class="bar [^>]*width="([\d.]+)"', svg)]
    assert widths[1] / widths[0] == pytest.approx(4, rel=0.01)
    assert "Bars start at chance 0.500." in svg


def test_classes_differ_by_shape_and_colour_and_figures_refuse_bad_input():
    looks = {(k % report_figures.COLOURS, report_figures._marker(k, 0, 0)) for k in range(40)}
    assert len(looks) == 40
    with pytest.raises(ValueError, match="2 labels"):
        report_figures.scatter_map(report_figures.MapPanel("t", np.ones((3, 2)), ["a", "b"]), "ab")
    with pytest.raises(ValueError, match="counts for 3 classes"):
        report_figures.confusion_matrix(report_figures.Confusion("t", ("a", "b", "c"), np.eye(2)))
    with pytest.raises(ValueError, match="waveform"):
        report_media.audio_uri(np.array([0.0, np.nan]), 8000)
