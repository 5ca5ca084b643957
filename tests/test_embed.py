"""The embed command: order, problems, streaming, and what it says."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from medalign_jax import embed
from medalign_jax.encoder import Encoder, architecture
from medalign_jax.experiments.export import export_encoder
from medalign_jax.locks import LockedError, held


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    import jax

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


def test_table_has_one_row_a_file_in_order(workdir, capsys):
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
    names = [path.name for path in embed.expand([str(workdir)])]
    assert names == ["a.wav", "b.flac", "broken.wav", "c.wav"]


def test_missing_file_and_empty_folder_are_named(workdir, tmp_path, capsys):
    for path in (tmp_path / "gone.wav", tmp_path):
        command = ["--checkpoint", str(workdir), "--out", str(tmp_path / "x"), str(path)]
        assert embed.main(command) == 1
        assert str(path) in capsys.readouterr().err


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
