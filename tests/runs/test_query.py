"""Recordings and words compared by what a run has exported."""

import json
import shutil

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file

import medalign_jax
from medalign_jax import embed, push, query
from medalign_jax.audio import io
from medalign_jax.data import open_dataset
from medalign_jax.data.recordings.wordings import Reports
from medalign_jax.search.common_space import FILES, REPORTS_FILE, SpaceError, load_space
from tests.hub_server import point_client_at, running
from tests.runs.tiny_config import tiny

pytestmark = pytest.mark.slow

RATE = 16_000
WORDS = ["a systolic murmur", "no murmur"]


@pytest.fixture(scope="module")
def sounds(finished):
    return sorted((finished / "simulated").rglob("*.wav"))[:6]


def head(tensors, side, x):
    """The released code's MLP without its dropout."""
    for number in (0, 3):
        x = (
            x @ tensors[f"{side}.layers.{number}.weight"].T
            + tensors[f"{side}.layers.{number}.bias"]
        )
        x = np.maximum(x, 0) if number == 0 else x
    return x


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_cosines_are_those_of_heads_whitening_and_map(finished, sounds):
    waves = [io.read(path, RATE) for path in sounds]
    folder = finished / "export"
    tensors, space = (
        load_file(folder / "heads.safetensors"),
        load_file(folder / "space.safetensors"),
    )
    settings = json.loads((folder / "space.json").read_text())["teacher"]
    assert settings.pop("fingerprint")
    teacher = medalign_jax.load_teacher(**settings)
    # In float64: whitening divides by small deviations, and the reference is not to round too.
    tensors, space = ({name: x.astype(np.float64) for name, x in each.items()}
                      for each in (tensors, space))  # fmt: skip
    words = (teacher.embed(WORDS) - space["whitening.mean"]) @ space["whitening.matrix"]
    words = head(tensors, "text", words) - space["map.text_mean"]
    audio = head(
        tensors, "audio_last", medalign_jax.load_encoder(None, finished).embed(waves, RATE)
    )
    audio = (audio - space["map.audio_mean"]) @ space["map.matrix"]
    found = load_space(finished).compare(waves, RATE, WORDS)
    np.testing.assert_allclose(found, unit(audio) @ unit(words).T, atol=1e-5)


def test_nearest_reports_are_training_reports_and_need_no_language_model(
    finished, sounds, monkeypatch
):
    def refuse(*_, **__):
        raise AssertionError("a language model was loaded")

    monkeypatch.setattr("medalign_jax.search.common_space.load_teacher", refuse)
    space = load_space(finished)
    waves = [io.read(path, RATE) for path in sounds]
    near = space.nearest_reports(waves, RATE, 4)
    assert all(len(each) == 4 for each in near)
    assert {n.text for each in near for n in each} <= set(space.meeting.reports)
    cosines = [n.similarity for n in near[0]]
    assert cosines == sorted(cosines, reverse=True)
    assert "procrustes map fitted on" in repr(space) and "training reports" in repr(space)


def test_the_map_was_fitted_on_each_sound_with_its_own_report(finished):
    """Rows that are mixed up anywhere between embedding and map bring own reports no nearer."""
    space = load_space(finished)
    data = open_dataset(finished / "simulated" / "metadata.csv", sample_rate=RATE)
    config = tiny()
    texts = Reports.of(data, config.reports.wordings, config.seed).texts
    train = [i for i, row in enumerate(data.rows) if row.split == "train"]
    assert len(train) == space.meeting.pairs
    place = {text: u for u, text in enumerate(space.meeting.reports)}
    own = np.array([place[texts[i][0]] for i in train])
    sounds = space.embed([data.waveform(i) for i in train], RATE)
    cosines = sounds @ unit(space.meeting.vectors).T
    rows = np.arange(len(train))
    nearer = cosines[rows, own].mean() - cosines.mean()
    shuffled = [
        cosines[rows, np.random.default_rng(seed).permutation(own)].mean() - cosines.mean()
        for seed in range(200)
    ]
    assert nearer > max(shuffled)


def test_the_command_prints_reports_words_and_similar_recordings(
    finished, sounds, tmp_path, capsys
):
    paths = [str(path) for path in sounds]
    checkpoint = ["--checkpoint", str(finished)]
    assert query.main([*checkpoint, *paths, "--count", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::3] == paths and len(lines) == 18
    assert query.main([*checkpoint, *paths, "--text", *WORDS, "--count", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("nearest to 'a systolic murmur':") == 1 and out.count("no murmur") == 7
    table = tmp_path / "all.parquet"
    assert embed.main([*checkpoint, *paths, "--out", str(table)]) == 0
    capsys.readouterr()
    assert query.main([*checkpoint, paths[3], "--index", str(table), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["near"][0]["recording"] == paths[3]
    assert found["near"][0]["similarity"] == pytest.approx(1, abs=1e-4)


def test_what_cannot_be_compared_is_said(finished, sounds, tmp_path, capsys):
    (tmp_path / "broken.wav").write_bytes(b"nothing")
    both = [str(sounds[0]), str(tmp_path / "broken.wav")]
    assert query.main(["--checkpoint", str(finished), *both]) == 1
    told = capsys.readouterr()
    assert "broken.wav" in told.err and str(sounds[0]) in told.out
    bare = tmp_path / "bare"
    shutil.copytree(finished / "export", bare)
    for name in (*FILES, "medalign.sha256"):
        (bare / name).unlink()
    assert query.main(["--checkpoint", str(bare), both[0]]) == 1
    assert "evaluated (evaluate.enabled=True)" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(finished / "export", other)
    settings = json.loads((other / "space.json").read_text())
    (other / "medalign.sha256").unlink()
    (other / "space.json").write_text(json.dumps(settings | {"map": "guess"}))
    with pytest.raises(SpaceError, match="does not say how to compare"):
        load_space(other)
    settings["teacher"]["fingerprint"] = "0" * 64
    (other / "space.json").write_text(json.dumps(settings))
    with pytest.raises(SpaceError, match="is not the language model"):
        load_space(other).embed_texts(WORDS)
    (other / REPORTS_FILE).write_bytes((other / REPORTS_FILE).read_bytes()[:-1] + b"?")
    with pytest.raises(SpaceError, match="damaged"):
        load_space(other)


def test_reports_may_be_left_behind_and_the_card_edited(finished, sounds, tmp_path, capsys):
    folder = tmp_path / "shared"
    shutil.copytree(finished / "export", folder)
    card = (folder / "README.md").read_text()
    assert "aligned with clinical reports by AcuLa" in card and "| after |" in card
    assert "Not a medical device" in card and "trained from nothing" in card
    (folder / "README.md").write_text(card + "The data are ours.")
    (folder / REPORTS_FILE).unlink()
    given = ["--checkpoint", str(folder), str(sounds[0])]
    assert query.main([*given, "--text", *WORDS]) == 0
    assert query.main(given) == 1
    assert "were left out of this export" in capsys.readouterr().err


def test_an_export_goes_to_the_hub_and_comes_back(finished, sounds, tmp_path, monkeypatch, capsys):
    with running() as hub:
        point_client_at(hub, tmp_path / "cache", monkeypatch)
        given = ["--checkpoint", str(finished), "--repo", "org/heart"]
        assert push.main([*given, "--dry_run"]) == 0 and not hub.created
        assert push.main(given) == 1
        assert "hf auth login" in capsys.readouterr().err
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert push.main(given) == 1 and "unset HF_HUB_OFFLINE" in capsys.readouterr().err
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_token")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
        assert push.main(given) == 0
        told = capsys.readouterr().out
        assert "(private)" in told and f"{REPORTS_FILE} stays here" in told
        assert hub.created == {"org/heart": True}
        (files,) = hub.repositories["org/heart"].commits.values()
        assert {"encoder.safetensors", "encoder.json", "README.md", "space.json"} < files.keys()
        assert REPORTS_FILE not in files
        waves = [io.read(path, RATE) for path in sounds]
        here, there = load_space(finished), load_space("org/heart")
        found, expected = (space.compare(waves, RATE, WORDS) for space in (there, here))
        np.testing.assert_array_equal(found, expected)
        with pytest.raises(SpaceError, match="left out of this export"):
            there.nearest_reports(waves, RATE)
        assert push.main([*given, "--reports"]) == 0  # once more: a second commit
        near = load_space("org/heart").nearest_reports(waves, RATE)
        assert near == here.nearest_reports(waves, RATE)


def test_what_is_not_described_is_not_shared(finished, tmp_path, capsys):
    assert push.main(["--checkpoint", str(tmp_path), "--repo", "org/heart"]) == 1
    assert "holds no export" in capsys.readouterr().err
    shutil.copytree(finished / "export", tmp_path / "export")
    (tmp_path / "export" / "README.md").unlink()
    assert push.main(["--checkpoint", str(tmp_path), "--repo", "org/heart"]) == 1
    assert "has no model card" in capsys.readouterr().err
