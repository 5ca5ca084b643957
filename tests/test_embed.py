"""The embed command: order, problems, streaming, and what it says."""

import csv
import os

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from medalign_jax import embed
from medalign_jax.architecture import architecture
from medalign_jax.core.errors import UserError
from medalign_jax.core.locks import LockedError, held
from medalign_jax.encoder import Encoder
from medalign_jax.evaluate import embedding_table
from medalign_jax.runs.export import export_encoder
from medalign_jax.search.files import expand


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    made = architecture(
        "vit_mae_small",
        {"frames": 16, "patch": (8, 16), "width": 32, "depth": 1, "heads": 2,
         "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2},
    )  # fmt: skip
    features, noise = np.zeros((1, 16, 64), np.float32), np.zeros((1, 8), np.float32)
    params = made.module.init(jax.random.key(0), features, noise)["params"]
    folder = tmp_path_factory.mktemp("run")
    export_encoder(folder / "export", Encoder(made, params, samples=15 * 512))
    rng = np.random.default_rng(0)
    for name, seconds in (("a.wav", 0.3), ("b.flac", 2.5), ("c.wav", 1.0)):
        audio = 0.1 * rng.standard_normal(int(seconds * 4000))
        soundfile.write(folder / name, audio, 4000)
    (folder / "broken.wav").write_bytes(b"RIFF, but no more")
    return folder


def test_table_has_one_row_per_file_in_order(workdir, capsys):
    files = [workdir / n for n in ("c.wav", "broken.wav", "a.wav", "b.flac")]
    out = workdir / "out.parquet"
    command = ["--checkpoint", str(workdir), "--out", str(out), *map(str, files)]
    assert embed.main(command) == 1  # one file is broken
    rows = pq.read_table(out).to_pylist()
    assert [row["audio_path"] for row in rows] == [str(f) for f in files]
    assert rows[1]["embedding"] is None and "broken.wav" in rows[1]["problem"]
    assert [round(row["seconds"], 2) for row in rows] == [1.0, 0.0, 0.3, 2.5]
    assert "1 files could not be embedded" in capsys.readouterr().out
    alone = embed.load_encoder(None, workdir)
    waveform, rate = soundfile.read(files[2], dtype="float32")
    np.testing.assert_allclose(rows[2]["embedding"], alone.embed([waveform], rate)[0], atol=1e-5)


def test_folder_stands_for_its_recordings(workdir):
    names = [path.name for path in expand([str(workdir)])]
    assert names == ["a.wav", "b.flac", "broken.wav", "c.wav"]


def test_missing_file_and_empty_folder_are_named(workdir, tmp_path, capsys):
    for path in (tmp_path / "gone.wav", tmp_path):
        command = ["--checkpoint", str(workdir), "--out", str(tmp_path / "x"), str(path)]
        assert embed.main(command) == 1
        assert str(path) in capsys.readouterr().err


def test_a_table_in_the_place_of_recordings_and_a_time_that_is_none(workdir, tmp_path, capsys):
    (tmp_path / "m.csv").write_text("audio_path\na.wav\n")
    command = ["--checkpoint", str(workdir), "--out", str(tmp_path / "x.csv")]
    assert embed.main([*command, str(tmp_path / "m.csv")]) == 1
    assert "m.csv is a table; give a table of recordings as --manifest" in capsys.readouterr().err
    for time in ("0", "-1", "nan", "inf", "x"):
        with pytest.raises(SystemExit):
            embed.main([*command, str(workdir), "--max_seconds", time])
        assert f"'{time}' is not a time above 0, in seconds" in capsys.readouterr().err
    assert not (tmp_path / "x.csv").exists()


def test_what_is_left_out_of_a_folder_is_said(workdir, tmp_path):
    sound = (workdir / "a.wav").read_bytes()
    for name in ("a.wav", "._a.wav", "__MACOSX/b.wav", "c.m4a", "d.webm", "e.M4A", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(sound)
    rate = 16_000
    for name in ("f.aiff", "g.opus"):
        kind = {"f.aiff": "AIFF", "g.opus": "OGG"}[name]
        subtype = "OPUS" if kind == "OGG" else None
        soundfile.write(tmp_path / name, np.ones(rate) / 2, rate, format=kind, subtype=subtype)
    said = []
    names = [path.name for path in expand([str(tmp_path)], said.append)]
    assert names == ["a.wav", "f.aiff", "g.opus"]
    assert (
        said[0] == f"{tmp_path}: left out are 2 files that macOS left beside others (._*, __MACOSX)"
    )
    assert "3 recordings that cannot be read (2 .m4a, 1 .webm; the first is" in said[1]
    assert "ffmpeg -i FILE NEW.wav" in said[1] and len(said) == 2
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "x.m4a").write_bytes(sound)
    with pytest.raises(UserError, match=r"holds no recording .*but 1 recordings .*1 \.m4a.*ffmpeg"):
        expand([str(tmp_path / "only")])


def test_a_name_that_is_not_utf8_costs_no_table(workdir, tmp_path, capsys):
    folder = os.fsencode(tmp_path)
    for name, content in ((b"/souffl\xe9.wav", (workdir / "a.wav").read_bytes()),
                          (b"/cass\xe9.wav", b"RIFF")):  # fmt: skip
        with open(folder + name, "wb") as file:
            file.write(content)
    out = tmp_path / "x.parquet"
    assert embed.main(["--checkpoint", str(workdir), "--out", str(out), str(tmp_path)]) == 1
    broken, good = pq.read_table(out).to_pylist()
    assert good["audio_path"] == f"{tmp_path}/souffl\\xe9.wav" and len(good["embedding"]) == 32
    assert broken["problem"].startswith(f"{tmp_path}/cass\\xe9.wav: is not audio")
    assert "cass\\xe9.wav" in capsys.readouterr().out


def test_csv_holds_what_parquet_holds(workdir, tmp_path):
    files = [str(workdir / name) for name in ("a.wav", "broken.wav", "c.wav")]
    for name in ("x.csv", "x.parquet"):
        assert embed.main(["--checkpoint", str(workdir), f"--out={tmp_path / name}", *files]) == 1
    wanted = pq.read_table(tmp_path / "x.parquet").to_pylist()
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [f"embedding_{n}" for n in range(32)]
    assert list(rows[0]) == ["audio_path", "seconds", *names, "problem"]
    assert [row["audio_path"] for row in rows] == files
    for row, want in zip(rows, wanted, strict=True):
        assert row["problem"] == (want["problem"] or "")
        assert float(row["seconds"]) == want["seconds"]
        found = [row[name] for name in names]
        vector = want["embedding"] or [""] * 32
        assert [x and np.float32(x) for x in found] == [x and np.float32(x) for x in vector]


def test_npz_holds_what_parquet_holds_and_is_read_back(workdir, tmp_path):
    tables = {}
    for name in ("x.npz", "x.parquet"):
        embed.main(["--checkpoint", str(workdir), "--out", str(tmp_path / name), str(workdir)])
        tables[name] = embedding_table.read_table(tmp_path / name)
    one, other = tables.values()
    np.testing.assert_array_equal(one.embeddings, other.embeddings)
    assert one.columns == other.columns and one.numbers == other.numbers
    assert [p.row for p in one.problems] == [p.row for p in other.problems] and one.problems
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert arrays["embedding"].shape == (4, 32) and np.isnan(arrays["embedding"]).any()


@pytest.mark.parametrize(
    ("save", "said"),
    [
        (lambda path: path.write_bytes(b"PK\x03\x04 and no more"), "cannot be read as .npz"),
        (lambda path: np.savez(path, embeding=np.ones((2, 3))), "did you mean 'embeding'"),
        (lambda path: np.savez(path, embedding=np.ones((2, 3)), label=np.array(["a"])),
         "'label' is (1,), not (2,)"),
        (lambda path: np.savez(path, embedding=np.array([["a"]])), "no array 'embedding'"),
        (lambda path: np.savez(path, embedding=np.array([[{}]])), "cannot be read as .npz"),
        (lambda path: np.savez_compressed(path, embedding=np.ones((2, 3))), "is compressed"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_table_are_refused(tmp_path, save, said):
    save(tmp_path / "x.npz")
    with pytest.raises(UserError) as refused:
        embedding_table.read_table(tmp_path / "x.npz")
    assert said in str(refused.value)


def test_a_table_of_another_kind_is_refused_at_once(workdir, tmp_path, capsys):
    out = tmp_path / "x.xlsx"
    arguments = ["--checkpoint", str(tmp_path / "none"), f"--out={out}", str(workdir / "a.wav")]
    assert embed.main(arguments) == 1
    assert "ends in .parquet, .csv or .npz" in capsys.readouterr().err
    arguments[2] = f"--out={tmp_path}"
    assert embed.main(arguments) == 1
    assert f"error: {tmp_path} is a folder; name a file in it" in capsys.readouterr().err


def test_a_manifests_columns_stand_beside_the_embeddings(workdir, tmp_path, capsys):
    manifest = workdir / "m.jsonl"
    manifest.write_text(
        '{"Audio_Path": "c.wav", "label": "x", "Subject_ID": 7, "peaks": [1], "seconds": 9}\n'
        '{"Audio_Path": "", "label": "y"}\nno json\n{"Audio_Path": "a.wav", "label": "z"}\n'
    )
    out = tmp_path / "x.parquet"
    assert embed.main([f"--checkpoint={workdir}", f"--out={out}", f"--manifest={manifest}"]) == 1
    rows = pq.read_table(out).to_pylist()
    manifest.unlink()
    assert [row["label"] for row in rows] == ["x", "y", "", "z"]
    assert [row["subject_id"] for row in rows] == ["7", "", "", ""]
    assert [row["embedding"] is None for row in rows] == [False, True, True, False]
    assert rows[0]["audio_path"] == str(workdir / "c.wav") and rows[0]["seconds"] == 1.0
    assert rows[1]["problem"] == "row 2: no audio_path"
    assert rows[2]["problem"].startswith("row 3: not a JSON object")
    said = capsys.readouterr().err
    assert "columns seconds are left out" in said
    assert "column 'peaks' holds no text in 1 rows" in said
    table = embedding_table.read_table(out)
    assert table.columns["label"] == ("x", "z") and len(table.problems) == 2


def test_an_embedding_that_is_not_finite_is_refused_by_name(workdir, tmp_path, capsys):
    encoder = embed.load_encoder(None, workdir)
    broken = encoder.with_params(jax.tree.map(lambda x: x * np.nan, encoder.params))
    out = tmp_path / "x.parquet"
    assert embed.embed_files(broken, [workdir / "a.wav"], out) == 1
    (row,) = pq.read_table(out).to_pylist()
    assert row["embedding"] is None
    assert row["problem"].startswith(f"{workdir / 'a.wav'}: its embedding holds NaN")
    with pytest.raises(UserError, match="recording 0: its embedding holds NaN or infinite"):
        broken.embed([np.full(100, 0.1, np.float32)], 16_000)


class Loudness:
    """Stands for an encoder: the deviation of a recording."""

    sample_rate, width = 4000, 1

    def stream(self, recordings):
        for waveform, _ in recordings:
            yield np.array([waveform.std()])


def test_two_commands_do_not_write_one_table(workdir, tmp_path):
    out = tmp_path / "table.parquet"
    told = pytest.raises(LockedError, match=r"table\.parquet is in use .*name another --out")
    with held(out, folder=False), told:
        embed.embed_files(Loudness(), [workdir / "a.wav"], out)
    assert not any(tmp_path.iterdir())
    assert embed.embed_files(Loudness(), [workdir / "a.wav"], out) == 0
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_a_stop_says_that_there_is_no_table(workdir, tmp_path, capsys, monkeypatch):
    class Stopped(Loudness):
        def stream(self, recordings):
            raise KeyboardInterrupt

    monkeypatch.setattr(embed, "load_encoder", lambda *_: Stopped())
    out = tmp_path / "table.parquet"
    command = [f"--checkpoint={workdir}", f"--out={out}", str(workdir / "a.wav")]
    assert embed.main(command) == 130
    said = capsys.readouterr().out
    assert said == f"stopped: {out} was not written; the same command begins again\n"
    assert not any(tmp_path.iterdir())
