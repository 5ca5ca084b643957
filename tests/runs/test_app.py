"""The app in a browser: drop, play, compare, ask; and what it does with broken files."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from medalign_jax.app import render
from medalign_jax.app.listener import Heard, compared_with, open_listener
from medalign_jax.search.common_space import Nearest
from medalign_jax.search.files import read_items
from medalign_jax.search.judge import Judgement
from tests import distill_models

gradio = pytest.importorskip("gradio", reason="the app is not installed")
from medalign_jax.app.interface import Answers, blocks, launch  # noqa: E402

pytestmark = pytest.mark.slow

HOSTILE = "<script>alert('x')</script>"


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def listeners(finished):
    items = read_items(finished / "simulated" / "metadata.csv")
    opened = [open_listener(name, str(finished), None) for name in ("one", "two")]
    return [compared_with(each, items, "label") for each in opened]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return distill_models.world(tmp_path_factory.mktemp("asked"), 4).student


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sounds") / "beat & <i>.wav"
    time = np.arange(32_000) / 16_000
    soundfile.write(path, np.sin(300 * time) * (time % 0.8 < 0.1), 16_000)
    return path


@pytest.fixture(scope="module")
def address(listeners, model, tmp_path_factory):
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("uploads"))
    page = blocks(listeners, model)
    yield launch(page, "127.0.0.1", None)
    page.close(verbose=False)


@pytest.fixture(params=[("light", 1100), ("dark", 390)], ids=["wide-light", "phone-dark"])
def opened(browser, address, sound, request):
    """The app with a sound dropped into it; it reaches for nothing outside."""
    scheme, width = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, outside = context.new_page(), []
    page.on("request", lambda r: outside.append(r.url)
            if not r.url.startswith((address, "data:", "blob:")) else None)  # fmt: skip
    page.goto(address)
    page.set_input_files("#sound input[type=file]", sound)
    page.wait_for_selector(".heard .listener")
    yield page
    context.close()
    assert outside == []


def test_a_dropped_sound_is_seen_heard_and_compared(opened):
    checkpoints = opened.locator(".listener")
    assert [each.get_attribute("aria-label") for each in checkpoints.all()] == ["one", "two"]
    heads = checkpoints.first.locator("h2").all_inner_texts()
    assert heads == ["one", "Labels", "Your words", "Nearest training reports",
                     "Recordings most like it"]  # fmt: skip
    assert "beat & i.wav, 2.0 s" in opened.locator("#shown").inner_text()
    shares = checkpoints.first.locator("meter").evaluate_all("all => all.map((m) => m.value)")
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert checkpoints.first.locator(".near audio").count() == 3
    opened.evaluate("() => document.querySelector('#shown audio').play()")
    at = "() => Number(document.querySelector('.in-step').style.getPropertyValue('--at'))"
    opened.wait_for_function(f"({at})() > 0.1")
    opened.locator(".in-step .stack").click(position={"x": 2, "y": 20})
    opened.wait_for_function(f"({at})() < 0.1")


def test_words_are_compared_when_asked_and_the_model_answers(opened):
    opened.get_by_label("Words to compare with").fill(f"a murmur {HOSTILE}\n\nno murmur")
    opened.locator("#compare").click()
    words = opened.locator(".listener").first.locator("ol.near").first
    words.get_by_text(re.compile(r"^\S+ no murmur$")).wait_for()
    assert HOSTILE in words.inner_text()
    opened.get_by_label("Question").fill("What is heard?")
    opened.locator("#ask").click()
    opened.locator("#answer .response").wait_for()
    assert opened.locator("#answer h2").inner_text() == "Answer"


def test_nothing_keeps_anybody_out(opened):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(opened).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
    assert opened.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert "not a medical device" in opened.inner_text("body")


def test_what_is_missing_is_asked_for(browser, address):
    page = browser.new_page()
    page.goto(address)
    page.locator("#ask").click()
    page.get_by_text("Drop or record a sound first.").wait_for()
    page.close()


def test_broken_files_are_refused_in_words(listeners, sound, tmp_path):
    answers, rng = Answers(listeners[:1], None), np.random.default_rng(0)
    whole = sound.read_bytes()
    broken = [b"", b"RIFF", whole[:40], b"\0" * 5000, whole[:20] + b"\xff" * 24 + whole[44:]]
    broken += [rng.bytes(int(n)) for n in rng.integers(1, 20_000, 45)]
    for n, content in enumerate(broken):
        path = tmp_path / f"{n}.{('wav', 'mp3', 'flac', 'ogg', 'txt')[n % 5]}"
        path.write_bytes(content)
        said, heard = answers.listen(str(path))
        assert 'role="alert"' in said and heard == "", (n, said[:200])
        assert path.name in said and str(tmp_path) not in said


def test_memory_does_not_grow_with_uploads(listeners, tmp_path):
    answers, rng = Answers(listeners[:1], None), np.random.default_rng(0)
    path, sizes = tmp_path / "noise.wav", []
    for n in range(200):
        noise = rng.standard_normal(16_000 * (1 + n % 4)) * 0.1
        soundfile.write(path, noise, 16_000)
        assert 'class="heard"' in answers.listen(str(path), "a murmur")[1]
        sizes.append(resident_bytes())
    assert sizes[-1] - sizes[49] < 30 * 2**20


def test_the_four_stages_are_shown_and_escaped():
    stages = "".join(f"<{n}>{n} {HOSTILE}</{n}>" for n in
                     ("PLANNING", "CAPTION", "REASONING", "SUMMARY"))  # fmt: skip
    page = render.response(f"<THINK>{stages}</THINK><RESPONSE>yes</RESPONSE>")
    assert [name for name in re.findall(r"<summary>(.*?)</summary>", page)] == [
        "Planning", "What is heard", "Reasoning", "Summary"]  # fmt: skip
    assert "<script" not in page and page.count("&lt;script") == 4
    assert "no answer" in render.response("  ")


def test_who_should_look_is_said():
    unsure = Judgement({"a": 0.5, "b": 0.4, "c": 0.1}, ("a", "b"))
    said = render.heard([Heard("x", (Nearest("r", 0.5),), judgement=unsure)])
    assert "Look at this yourself: a and b cannot be told apart here." in said
    assert "cannot be told apart" not in render.heard([Heard("x", judgement=None)])
    strange = Judgement({"a": 0.5, "b": 0.5}, ())
    assert "it is like no class clearly enough" in render.heard([Heard("x", judgement=strange)])
    unlike = Judgement({"a": 0.99, "b": 0.01}, ("a",), unlike=True)
    assert "unlike every recording" in render.heard([Heard("x", judgement=unlike)])


def test_what_is_left_out_of_a_recording_is_said(listeners, tmp_path):
    answers, path = Answers(listeners[:1], None), tmp_path / "x.wav"
    tone = np.sin(np.arange(4000 * 70) * 0.2) * 0.3
    soundfile.write(path, tone, 4000)
    assert "The first 60 s of 70 s were listened to." in answers.listen(str(path))[0]
    soundfile.write(path, tone[:200], 4000)
    assert "is 0.05 s long; record 1 s or more" in answers.listen(str(path))[0]
    soundfile.write(path, np.where(np.arange(4000 * 70) < 4000 * 62, 0.0, tone), 4000)
    assert "is silent for its first 60 s" in answers.listen(str(path))[0]


def test_the_command_serves_until_it_is_ended_and_leaves_nothing(finished, tmp_path):
    command = [sys.executable, "-m", "medalign_jax.app", "--checkpoint", str(finished)]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("open http://127.0.0.1:")
    assert any(tmp_path.glob("medalign_app_*"))
    process.send_signal(signal.SIGTERM)
    assert "what was uploaded is deleted" in process.communicate(timeout=30)[0]
    assert process.returncode == 143
    assert not list(Path(tmp_path).glob("medalign_app_*"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "name a --checkpoint"),
        (["--checkpoint", "X", "--label", "l"], "name that too"),
        (["--checkpoint", "X", "--recordings", "X/simulated", "--label", "l"], "needs a table"),
        (["--checkpoint", "X", "--recordings", "X/simulated/metadata.csv", "--label", "labl"],
         "no column 'labl' (did you mean 'label'?)"),
        (["--checkpoint", "X/nothing"], "nothing"),
    ],
)  # fmt: skip
def test_a_command_line_that_means_nothing_is_said(finished, capsys, given, said):
    from medalign_jax.app.__main__ import main

    assert main([text.replace("X", str(finished)) for text in given]) == 1
    assert said in capsys.readouterr().err
