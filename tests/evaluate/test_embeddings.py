"""The store: each recording decoded once, what each encoder gets alone, killed and resumed."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from medalign_jax import embed
from medalign_jax.architecture import architecture
from medalign_jax.audio import io as audio_io
from medalign_jax.core.errors import UserError
from medalign_jax.core.mesh import make_mesh
from medalign_jax.data.recordings import prepare, sources
from medalign_jax.data.recordings.dataset import open_dataset
from medalign_jax.encoder import Encoder
from medalign_jax.evaluate.embedding_table import read_table
from medalign_jax.evaluate.embeddings import EmbeddingStore
from medalign_jax.search.files import Item
from tests import devices
from tests import tiny_models as tiny

SCRIPT = Path(__file__).with_name("run_store.py")


class Plain:
    """An embedder without JAX: mean, deviation and length of what it gets; counts it."""

    width = 3

    def __init__(self, sample_rate: int = 16_000, name: str = "plain", fail_at: int | None = None):
        self.sample_rate, self._name, self._fail_at = sample_rate, name, fail_at
        self.seen = 0

    def settings(self):
        return {"name": self._name, "sample_rate": self.sample_rate}

    def identity(self):
        return hashlib.sha256(json.dumps(self.settings()).encode()).hexdigest()

    def stream(self, recordings):
        for waveform, rate in recordings:
            if self.seen == self._fail_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.seen += 1
            yield np.array([waveform.mean(), waveform.std(), len(waveform) / rate], np.float32)


def write_recordings(folder: Path, count: int, rates=(4_000, 8_000)) -> Path:
    """A manifest of so many short noises, at one rate and the other in turn."""
    lines = ["audio_path,subject_id,report"]
    for i in range(count):
        rate = rates[i % len(rates)]
        noise = np.random.default_rng(i).uniform(-0.5, 0.5, rate // 2 + 17 * i)
        soundfile.write(folder / f"{i}.wav", noise, rate, subtype="PCM_16")
        lines.append(f"{i}.wav,s{i},Report {i}.")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_recordings(tmp_path_factory.mktemp("recordings"), 10)


@pytest.fixture
def reads(monkeypatch):
    """Files decoded since the test began, in order."""
    found, read = [], audio_io.read

    def counted(path, *rest):
        found.append(Path(path).name)
        return read(path, *rest)

    monkeypatch.setattr(audio_io, "read", counted)
    return found


@pytest.fixture(scope="module")
def small():
    sizes = {"frames": 16, "patch": (8, 32), "width": 16, "depth": 1, "heads": 2,
             "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}  # fmt: skip
    made = architecture("vit_mae_small", sizes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.3 * rng.standard_normal(x.shape)).astype(x.dtype), made.abstract_params()
    )
    return Encoder(made, jax.device_put(params), tiny.SAMPLES, batch_size=4)


def opened(manifest, rate=16_000, **options):
    return open_dataset(manifest, sample_rate=rate, **options)


def alone(embedder, manifest, rate=None):
    """What an embedder gives of a data set opened at its own rate."""
    dataset = opened(manifest, rate or embedder.sample_rate)
    pairs = [(dataset.waveform(i), dataset.sample_rate) for i in range(len(dataset))]
    return np.stack(list(embedder.stream(pairs)))


def test_each_encoder_gets_what_it_gets_alone(manifest, tmp_path, small):
    embedders = {"small": small, "8k": Plain(8_000), "48k": Plain(48_000)}
    expected = {name: alone(e, manifest) for name, e in embedders.items()}
    for rate in (16_000, 8_000):
        found = EmbeddingStore(tmp_path / str(rate)).embed(embedders, opened(manifest, rate))
        for name, vectors in expected.items():
            assert found[name].dtype == np.float32
            if name == "small":  # batches of other company
                np.testing.assert_allclose(found[name], vectors, rtol=1e-4, atol=1e-5)
            else:
                np.testing.assert_array_equal(found[name], vectors)


def test_a_recording_is_decoded_once_for_all(manifest, tmp_path, reads):
    dataset = opened(manifest)
    assert sorted(reads) == sorted(f"{i}.wav" for i in range(10))  # the check
    reads.clear()
    store = EmbeddingStore(tmp_path)
    store.embed({"a": Plain(name="a"), "b": Plain(name="b")}, dataset)
    assert reads == []  # in memory
    store.embed({"c": Plain(8_000), "d": Plain(48_000), "e": Plain(name="e")}, dataset)
    assert sorted(reads) == sorted(f"{i}.wav" for i in range(10))


def test_a_second_run_neither_decodes_nor_embeds(manifest, tmp_path, reads, capsys):
    dataset = opened(manifest, cache_bytes=0)
    first = EmbeddingStore(tmp_path).embed({"x": Plain()}, dataset)["x"]
    reads.clear(), capsys.readouterr()
    again = Plain()
    second = EmbeddingStore(tmp_path).embed({"y": again}, dataset)["y"]
    np.testing.assert_array_equal(second, first)
    assert again.seen == 0 and reads == [] and capsys.readouterr().out == ""


def test_only_what_is_missing_is_embedded(manifest, tmp_path):
    dataset, store = opened(manifest), EmbeddingStore(tmp_path)
    store.embed({"x": Plain()}, dataset.select([1, 4, 7]))
    more, other = Plain(), Plain(name="other")
    found = store.embed({"x": more, "other": other}, dataset)
    assert (more.seen, other.seen) == (7, 10)
    np.testing.assert_array_equal(found["x"], found["other"])
    turned = store.embed({"x": Plain()}, dataset.select(range(9, -1, -1)))["x"]
    np.testing.assert_array_equal(turned, found["x"][::-1])


def test_the_same_encoder_under_two_names_runs_once(manifest, tmp_path):
    one, other = Plain(), Plain()
    found = EmbeddingStore(tmp_path).embed({"a": one, "b": other}, opened(manifest))
    assert one.seen + other.seen == 10
    np.testing.assert_array_equal(found["a"], found["b"])


def test_other_weights_or_settings_are_other_embeddings(manifest, tmp_path, small):
    dataset, store = opened(manifest).select([0, 1]), EmbeddingStore(tmp_path)
    first = store.embed({"x": small}, dataset)["x"]
    halved = small.with_params(jax.tree.map(lambda x: 0.5 * x, small.params))
    second = store.embed({"x": halved}, dataset)["x"]
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(store.embed({"x": small}, dataset)["x"], first)


def test_a_renamed_file_is_known_and_one_written_anew_is_not(tmp_path):
    manifest = write_recordings(tmp_path, 3)
    store = EmbeddingStore(tmp_path / "store")
    first = store.embed({"x": Plain()}, opened(manifest))["x"]
    os.rename(tmp_path / "1.wav", tmp_path / "renamed.wav")
    samples, rate = soundfile.read(tmp_path / "2.wav", dtype="int16")
    soundfile.write(tmp_path / "2.flac", samples, rate, subtype="PCM_16")
    text = manifest.read_text().replace("1.wav", "renamed.wav").replace("2.wav", "2.flac")
    manifest.write_text(text)
    again = Plain()
    second = store.embed({"x": again}, opened(manifest))["x"]
    assert again.seen == 1  # the one in another format
    np.testing.assert_array_equal(second, first)
    soundfile.write(tmp_path / "0.wav", samples, rate, subtype="PCM_16")  # other content
    changed = Plain()
    with pytest.raises(UserError):  # now the same as 2.flac
        opened(manifest)
    soundfile.write(tmp_path / "0.wav", samples[::-1], rate, subtype="PCM_16")
    third = store.embed({"x": changed}, opened(manifest))["x"]
    assert changed.seen == 1 and not np.array_equal(third[0], second[0])


def test_how_much_is_read_counts(manifest, tmp_path):
    store = EmbeddingStore(tmp_path)
    whole = store.embed({"x": Plain()}, opened(manifest))["x"]
    part = store.embed({"x": Plain()}, opened(manifest, max_seconds=0.25))["x"]
    assert (part[:, 2] <= 0.25).all() and (whole[:, 2] >= 0.5).all()


def test_a_prepared_folder_gives_the_same(manifest, tmp_path, small, reads):
    folder = tmp_path / "prepared"
    assert prepare.main(["--manifest", str(manifest), "--out", str(folder)]) == 0
    dataset = open_dataset(folder)
    embedders = {"16k": Plain(), "8k": Plain(8_000)}
    found = EmbeddingStore(tmp_path / "store").embed(embedders, dataset)
    np.testing.assert_array_equal(found["16k"], alone(Plain(), manifest))
    # There are no other rates in it: the encoder gets what there is, and its rate.
    np.testing.assert_array_equal(found["8k"], alone(Plain(8_000), manifest, 16_000))
    again = Plain()
    reads.clear()
    EmbeddingStore(tmp_path / "store").embed({"x": again}, open_dataset(folder))
    assert again.seen == 0 and reads == []


def test_without_a_folder_nothing_is_kept(manifest):
    store, dataset = EmbeddingStore(None), opened(manifest)
    first, second = Plain(), Plain()
    a, b = (store.embed({"x": e}, dataset)["x"] for e in (first, second))
    assert first.seen == second.seen == 10
    np.testing.assert_array_equal(a, b)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_a_killed_run_goes_on(manifest, tmp_path):
    command = [sys.executable, SCRIPT, "kill", manifest, tmp_path, "8"]
    done = subprocess.run(command, env=devices.environment(1), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len(shards(tmp_path)) == 2  # of three recordings each; two more were lost
    rest = Plain()
    found = EmbeddingStore(tmp_path, 3).embed({"x": rest}, opened(manifest))["x"]
    assert rest.seen == 4
    np.testing.assert_array_equal(found, alone(Plain(), manifest))


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_file_is_named_and_made_again(manifest, tmp_path, capsys, damage):
    dataset, store = opened(manifest), EmbeddingStore(tmp_path, 4)
    first = store.embed({"x": Plain()}, dataset)["x"]
    assert len(shards(tmp_path)) == 3
    victim = shards(tmp_path)[0]
    held = 2 if victim.stat().st_size < max(p.stat().st_size for p in shards(tmp_path)) else 4
    content = bytearray(victim.read_bytes())
    content[-3] ^= 1
    victim.write_bytes({"flipped": content, "cut": content[:-9], "empty": b""}[damage])
    capsys.readouterr()
    again = Plain()
    np.testing.assert_array_equal(store.embed({"x": again}, dataset)["x"], first)
    said = capsys.readouterr().out
    assert str(victim) in said and "checksum" in said and again.seen == held
    assert EmbeddingStore(tmp_path).embed({"x": Plain()}, dataset)["x"].tobytes() == first.tobytes()
    assert "damaged" not in capsys.readouterr().out


def test_a_whole_file_of_other_things_is_not_a_shard(manifest, tmp_path, capsys):
    dataset, store = opened(manifest), EmbeddingStore(tmp_path)
    first = store.embed({"x": Plain()}, dataset)["x"]
    folder = shards(tmp_path)[0].parent
    for content in (b"not a shard", tiny_safetensors()):
        (folder / f"{hashlib.sha256(content).hexdigest()}.safetensors").write_bytes(content)
    np.testing.assert_array_equal(store.embed({"x": Plain()}, dataset)["x"], first)
    assert capsys.readouterr().out.count("is damaged") == 2


def tiny_safetensors() -> bytes:
    from safetensors.numpy import save

    return save({"recordings": np.zeros((1, 32), np.uint8), "embeddings": np.zeros((1, 9))})


def test_what_an_encoder_is_stands_beside(manifest, tmp_path, small):
    EmbeddingStore(tmp_path).embed({"x": small}, opened(manifest).select([0]))
    (description,) = tmp_path.rglob("encoder.json")
    found = json.loads(description.read_text())
    assert found["name"] == "vit_mae_small" and len(found["identity"]) == 64


def test_numbers_that_are_not_finite_are_refused_and_the_others_kept(manifest, tmp_path):
    class Broken(Plain):
        def stream(self, recordings):
            for i, row in enumerate(super().stream(recordings)):
                yield row if i != 4 else np.full(3, np.nan, np.float32)

    with pytest.raises(UserError, match=r"4\.wav: .*'plain' is not finite"):
        EmbeddingStore(tmp_path).embed({"x": Broken()}, opened(manifest))
    rest = Plain()
    EmbeddingStore(tmp_path).embed({"x": rest}, opened(manifest))
    assert rest.seen == 6


def test_a_file_that_is_gone_is_named(tmp_path):
    manifest = write_recordings(tmp_path, 3)
    dataset = opened(manifest)
    os.remove(tmp_path / "1.wav")
    with pytest.raises(sources.audio_io.AudioError, match=r"1\.wav"):
        EmbeddingStore(tmp_path / "store").embed({"x": Plain()}, dataset)


def test_a_folder_that_cannot_be_is_named(manifest, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*cannot be written to"):
        EmbeddingStore(tmp_path / "file").embed({"x": Plain()}, opened(manifest))


def test_many_recordings_run_in_chunks(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr("medalign_jax.evaluate.embeddings._CHUNK", 3)
    monkeypatch.setattr("medalign_jax.evaluate.embeddings._AHEAD", 2)
    found = EmbeddingStore(tmp_path).embed({"a": Plain(), "b": Plain(8_000)}, opened(manifest))
    np.testing.assert_array_equal(found["a"], alone(Plain(), manifest))
    np.testing.assert_array_equal(found["b"], alone(Plain(8_000), manifest))


def test_all_devices_of_a_mesh(manifest, tmp_path, small):
    mesh = make_mesh(devices=jax.devices())
    spread = Encoder(small.architecture, small.params, tiny.SAMPLES, mesh=mesh, batch_size=4)
    assert spread.identity() == small.identity()
    dataset = opened(manifest)
    np.testing.assert_allclose(
        EmbeddingStore(None).embed({"x": spread}, dataset)["x"],
        EmbeddingStore(None).embed({"x": small}, dataset)["x"],
        rtol=1e-4,
        atol=1e-5,
    )


def test_two_processes_share_the_work_and_all_get_the_whole(manifest, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [SCRIPT, "share", manifest, tmp_path, address]
    both = [devices.start([*command, n], devices=1) for n in (0, 1)]
    outputs = [process.communicate(timeout=devices.WAIT)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    expected = alone(Plain(), manifest)
    for number in (0, 1):
        found = json.loads((tmp_path / f"{number}.json").read_text())
        assert found["seen"] == [5, 0, 2]  # its half; nothing; its half of four lost ones
        assert "0.wav" in found["error"] or "process 0" in found["error"]
        np.testing.assert_array_equal(np.load(tmp_path / f"{number}.npy"), [expected] * 3)


# Tables of embeddings that were made elsewhere.


def table(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_a_table_as_embed_writes_it(manifest, tmp_path, small):
    files = [manifest.parent / f"{i}.wav" for i in (2, 0)]
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    files.insert(1, tmp_path / "broken.wav")
    assert embed.embed_files(small, files, tmp_path / "x.parquet") == 1
    found = read_table(tmp_path / "x.parquet")
    assert found.columns["audio_path"] == (str(files[0]), str(files[2]))
    (problem,) = found.problems
    assert problem.row == 2 and "broken.wav" in problem.audio_path and problem.reason
    sounds = [audio_io.read(files[i], 16_000) for i in (0, 2)]
    np.testing.assert_allclose(found.embeddings, small.embed(sounds, 16_000), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.list_(pa.float32(), 2)])
def test_columns_of_labels_come_along_as_text(tmp_path, kind):
    vectors = pa.array([[1, 2], [3, 4], None], kind)
    labels = {"AS": [True, False, True], "age": [50.0, None, 3.5], "n": [1, 2, 3],
              "sex": ["F", "N/A", "M"]}  # fmt: skip
    found = read_table(table(tmp_path / "x.parquet", **labels, embedding=vectors))
    np.testing.assert_array_equal(found.embeddings, np.array([[1, 2], [3, 4]], np.float32))
    assert found.columns == {
        "AS": ("1", "0"), "age": ("50", ""), "n": ("1", "2"), "sex": ("F", ""),
    }  # fmt: skip
    assert [(p.row, p.reason) for p in found.problems] == [(3, "has no embedding")]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"embeding": [[1.0]]}, r"no column 'embedding' \(did you mean 'embeding'\?\)"),
        ({"embedding": ["a"]}, r"of type string"),
        ({"embedding": [["a"]]}, r"lists of floats"),
        ({"embedding": [[1.0, 2.0], [1.0]]}, r"row 2 has 1 numbers and row 1 2"),
        ({"embedding": [[1.0], [float("nan")]]}, r"row 2 holds NaN"),
        ({"embedding": [[1.0], [None]]}, r"row 2 holds NaN"),
        ({"embedding": [[1.0], []]}, r"row 2 has 0 numbers"),
        ({"embedding": pa.array([None, None], pa.list_(pa.float32()))}, r"holds no embedding"),
    ],
)
def test_tables_that_cannot_be_used_are_named(tmp_path, columns, words):
    with pytest.raises(UserError, match=words):
        read_table(table(tmp_path / "x.parquet", **columns))


def test_csv_is_read_as_parquet_is(manifest, tmp_path, small):
    """What `embed` writes, in both forms, a recording without an embedding among them."""
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    named = ((manifest.parent / "0.wav", "a"), (broken, "b"), (manifest.parent / "1.wav", "N/A"))
    items = [Item(path, {"label": label}) for path, label in named]
    for name in ("x.parquet", "x.csv"):
        assert embed.embed_files(small, items, tmp_path / name) == 1
    one, other = (read_table(tmp_path / name) for name in ("x.parquet", "x.csv"))
    np.testing.assert_array_equal(one.embeddings, other.embeddings)
    assert other.columns["label"] == ("a", "") and one.columns["label"] == other.columns["label"]
    assert one.numbers == other.numbers == (1, 3)
    assert one.problems == other.problems and len(one.problems) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("embeding_0\n1\n", r"no column 'embedding_0'"),
        ("embedding_0,embedding_2\n1,2\n", r"no column 'embedding_1' between"),
        ("embedding_0,embedding_1\n1,2\n3,x\n", r"row 2: 'x' in column 'embedding_1'"),
        ("embedding_0,embedding_1\n1,\n", r"row 1: '' in column 'embedding_1'"),
        ("embedding_0,embedding_1\nnan,1\n", r"row 1: 'nan' in column 'embedding_0'"),
        ("embedding_0,label\n,a\n", r"holds no embedding"),
    ],
)
def test_csv_that_cannot_be_used_is_named(tmp_path, text, words):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_table(tmp_path / "x.csv")


def test_files_that_are_not_tables_are_named(tmp_path):
    (tmp_path / "x.parquet").write_text("audio_path\n")
    with pytest.raises(UserError, match=r"x\.parquet cannot be read"):
        read_table(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"no table of embeddings"):
        read_table(tmp_path / "y.parquet")
