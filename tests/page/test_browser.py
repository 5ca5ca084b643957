"""The page in a browser: figures are drawn, points are heard, tables are sorted."""

import numpy as np
import pytest

from medalign_jax.evaluate.results import Result
from medalign_jax.evaluate.tables import tables_of
from medalign_jax.page import figures, report
from medalign_jax.page.recordings import Example, Nearest, Recording, Response, Sound

SIZES = {"wide": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}


def tone(seconds=1):
    time = np.arange(16_000 * seconds) / 16_000
    return np.sin(2 * np.pi * 300 * time).astype(np.float32)


def until(page, expression):
    """Waits for it; in Playwright's own way it would be evaluated, which the page forbids."""
    for _ in range(100):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {expression}")


def results():
    values = {"before": 0.71, "after": 0.82, "spectral statistics": 0.8, "metadata": 0.48}
    found = [
        Result(task, "hearts", "linear", stage, "auroc", value, value - 0.05, value + 0.04, 9, 9)
        for task in ("murmur", "phase", "site")
        for stage, value in values.items()
    ]
    return [*found, Result("age", "hearts", "linear", "after", "mae", 8.2, 7.0, 9.9, 9, 9)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A page with everything on it."""
    rng = np.random.default_rng(0)
    labels = ["normal", "systolic murmur", "<b>diastolic</b>"] * 20
    panels = [figures.MapPanel(t, rng.standard_normal((60, 2)), (0.5, 0.2)) for t in "ab"]
    scores = tuple(figures.Score(r.stage, r.value, r.ci_low, r.ci_high) for r in results()[:4])
    response = Response("after", "yes", True, "It sounds so. yes")
    page = report.ReportData(
        title="<i>A page</i>",
        headline="The AUROC rose.",
        facts=[("encoder", "opera_ct")],
        scores=[figures.Scores("murmur", scores, "AUROC", "higher", 0.5)],
        tables=tables_of(results()),
        curves=[figures.Curves("CKA", (figures.Series("training", np.arange(9), np.ones(9)),))],
        maps=figures.Maps(panels, labels, ["rec & <report>"] * 60, {5: 0, 50: 1}),
        map_note="Test recordings.",
        sounds=[Sound("five.wav", tone(), 16_000), Sound("fifty.wav", tone(2), 16_000)],
        confusions=[figures.Confusion("Nearest", ("a", "b"), np.array([[9, 1], [3, 7]]))],
        recordings=[
            Recording("x.wav", tone(), 16_000, "a", "b", "A report.", rng.random((50, 20)),
                      (Nearest("A report.", 0.9, True),))
        ],
        examples=[Example("t", (Sound("y.wav", tone()),), "Is it?", ("yes", "no"), "yes",
                          (response,))],
        results=results(),
        unusable=[report.UnusableRow(3, "z.wav", "empty")],
        limits=["One limit."],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.write_report(path, page)
    return path


@pytest.fixture
def opened(browser, path, request):
    """The page, drawn; a message of the browser's fails the test."""
    size, scheme = getattr(request, "param", ("wide", "light"))
    context = browser.new_context(viewport=SIZES[size], color_scheme=scheme)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url[:60])
            if not request.url.startswith(("file:", "data:")) else None)  # fmt: skip
    page.goto(path.as_uri())
    until(page, "document.querySelectorAll('.plot .main-svg').length >= 4")
    yield page
    context.close()
    assert said == []


LOOKS = [(size, scheme) for size in SIZES for scheme in ("light", "dark")]


@pytest.mark.parametrize("opened", LOOKS, indirect=True, ids="-".join)
def test_nothing_keeps_anybody_out(opened):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(opened).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
    wider = opened.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wider <= 0, "the page scrolls sideways"


def test_figures_take_the_colours_of_the_page_and_follow_them(opened):
    colour = "document.querySelector('.plot .xtick text').style.fill"
    light = opened.evaluate(colour)
    opened.emulate_media(color_scheme="dark")
    until(opened, f"{colour} !== '{light}'")
    assert light and "$" not in light


def test_a_point_is_found_in_every_map_and_heard(opened):
    chosen = """() => [...document.querySelectorAll('.plot')]
        .filter((p) => p.data.some((t) => t.customdata)).map((p) => p.data.at(-1).x.length)"""
    assert opened.evaluate(chosen) == [0, 0]
    opened.select_option("#sound", "1")
    until(opened, "!document.getElementById('player').paused")
    assert opened.evaluate(chosen) == [1, 1]
    until(opened, "Math.abs(document.getElementById('player').duration - 2) < 0.2")
    # A click on the ring of the other sound: point 5, in the first map.
    place = opened.evaluate(
        """() => {
          const map = [...document.querySelectorAll('.plot')].find(
            (p) => p.data.some((t) => t.customdata));
          map.scrollIntoView({ block: 'center', behavior: 'instant' });
          const trace = map.data.find((t) => t.customdata?.includes(5));
          const n = trace.customdata.indexOf(5), box = map.getBoundingClientRect();
          const { xaxis, yaxis } = map._fullLayout;
          return [box.x + xaxis._offset + xaxis.d2p(trace.x[n]),
                  box.y + yaxis._offset + yaxis.d2p(trace.y[n])];
        }"""
    )
    opened.mouse.move(*place)
    text = opened.locator(".hoverlayer .hovertext").first
    text.wait_for()
    assert "<b>diastolic</b>" in text.text_content(), "what is data is shown as it is"
    assert "rec & <report>" in text.text_content()
    opened.mouse.click(*place)
    until(opened, "document.getElementById('sound').value === '0'")
    until(opened, "document.getElementById('player').duration < 1.5")


def test_tables_are_sorted_and_filtered(opened):
    table = opened.locator("#results table")
    values = table.locator("tbody tr:visible td:nth-child(6)")
    head = table.get_by_role("button", name="Value")
    head.click()
    assert values.all_inner_texts() == sorted(values.all_inner_texts(), key=float)
    assert values.first.inner_text() == "0.480"
    head.press("Enter")
    assert values.first.inner_text() == "8.200"
    assert table.locator("th[aria-sort=descending]").inner_text().startswith("Value")
    opened.locator("#results input").fill("spectral Phase")
    assert values.all_inner_texts() == ["0.800"]
    assert opened.locator("#results [role=status]").inner_text() == "1 of 13"
