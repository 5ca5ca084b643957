"""Reading: formats, rates, resampling, and every kind of bad file."""

import pickle
import struct

import numpy as np
import pytest
import soundfile

from medalign_jax.audio import AudioError, check_waveform, probe, read
from medalign_jax.audio import io as audio_io


def tone(frequency, sample_rate, seconds, amplitude=0.5):
    t = np.arange(int(seconds * sample_rate)) / sample_rate
    return amplitude * np.sin(2 * np.pi * frequency * t)


@pytest.mark.parametrize(
    ("suffix", "subtype", "atol"),
    [
        ("wav", "PCM_U8", 1 / 127),
        ("wav", "PCM_16", 1 / 32_000),
        ("wav", "PCM_24", 1e-6),
        ("wav", "PCM_32", 1e-7),
        ("wav", "FLOAT", 1e-7),
        ("wav", "DOUBLE", 1e-7),
        ("flac", "PCM_S8", 1 / 127),
        ("flac", "PCM_16", 1 / 32_000),
        ("flac", "PCM_24", 1e-6),
        ("ogg", "VORBIS", 0.03),
        ("ogg", "OPUS", 0.03),
        ("mp3", "MPEG_LAYER_III", 0.03),
    ],
)
def test_formats(tmp_path, suffix, subtype, atol):
    """The samples come back; the two channels become their mean."""
    left, right = tone(300, 16_000, 1.5), tone(500, 16_000, 1.5, amplitude=0.2)
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, np.stack([left, right], axis=1), 16_000, subtype=subtype)
    info = probe(path)
    assert (info.frames, info.sample_rate, info.channels, info.seconds) == (24_000, 16_000, 2, 1.5)
    waveform = read(path)
    assert waveform.dtype == np.float32 and waveform.shape == (24_000,)
    inner = slice(2_000, -2_000)  # lossy codecs smear the edges
    np.testing.assert_allclose(waveform[inner], ((left + right) / 2)[inner], rtol=0, atol=atol)
    check_waveform(waveform, path)


@pytest.mark.parametrize("rate", [4_000, 8_000, 10_000, 11_025, 22_050, 32_000, 44_100, 48_000])
def test_resampling_keeps_a_tone(tmp_path, rate):
    """Same frequency, amplitude and phase at 16 kHz, and nothing else above -80 dB."""
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(440, rate, 2.0), rate, subtype="FLOAT")
    waveform = read(path)
    assert waveform.shape == (32_000,)
    wanted = tone(440, 16_000, 2.0)
    inner = slice(4_000, -4_000)
    np.testing.assert_allclose(waveform[inner], wanted[inner], rtol=0, atol=1e-4)
    spectrum = np.abs(np.fft.rfft(waveform[inner] * np.blackman(24_000)))
    hz = np.fft.rfftfreq(24_000, 1 / 16_000)
    assert hz[spectrum.argmax()] == pytest.approx(440, abs=0.5)
    assert spectrum[np.abs(hz - 440) > 20].max() < 1e-4 * spectrum.max()


def test_resampling_removes_what_would_alias(tmp_path):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(10_000, 44_100, 2.0), 44_100, subtype="FLOAT")
    assert np.abs(read(path)[4_000:-4_000]).max() < 1e-4


def test_max_seconds_reads_the_beginning_only(tmp_path, monkeypatch):
    path = tmp_path / "long.wav"
    samples = np.random.default_rng(0).uniform(-1, 1, 40_000).astype(np.float32)
    soundfile.write(path, samples, 8_000, subtype="FLOAT")
    decoded = []
    original = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile,
        "read",
        lambda self, frames, **kw: decoded.append(frames) or original(self, frames, **kw),
    )
    np.testing.assert_array_equal(read(path, 8_000, max_seconds=1.5), samples[:12_000])
    assert sum(decoded) == 12_000
    assert read(path, 8_000, max_seconds=99).shape == (40_000,)
    with pytest.raises(AudioError, match="above 0"):
        read(path, max_seconds=0)


def test_long_files_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(audio_io, "_BLOCK_FRAMES", 1_000)
    path = tmp_path / "clip.wav"
    samples = np.random.default_rng(0).uniform(-1, 1, (4_321, 3)).astype(np.float32)
    soundfile.write(path, samples, 16_000, subtype="FLOAT")
    np.testing.assert_allclose(read(path), samples.mean(axis=1), rtol=0, atol=1e-7)


def expect(path, *words, action=read):
    """The error names path, reason and remedy."""
    with pytest.raises(AudioError) as caught:
        action(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and all(word in message for word in words), message
    assert any(sign in message for sign in (";", "record it again")), message
    return caught.value


def test_missing_folder_and_empty(tmp_path):
    expect(tmp_path / "none.wav", "no such file", "correct the path")
    expect(tmp_path, "not a file", "give the path")
    path = tmp_path / "empty.wav"
    path.touch()
    expect(path, "0 bytes", "copy it again")
    expect(f"{tmp_path}/nul\0.wav", "no such file")


@pytest.mark.parametrize(
    ("there", "asked", "words"),
    [
        ("heart/a.wav", "heart\\a.wav", "with / for"),
        ("souffle\u0301.wav", "souffl\u00e9.wav", "coded otherwise"),
        ("souffl\u00e9.wav", "souffle\u0301.wav", "coded otherwise"),
    ],
    ids=["windows", "macos", "to macos"],
)
def test_a_name_in_another_systems_writing_is_found(tmp_path, there, asked, words):
    path = tmp_path / there
    path.parent.mkdir(exist_ok=True)
    path.touch()
    expect(f"{tmp_path}/{asked}", "no such file", f"(there is '{path}'", words)


def test_header_without_samples(tmp_path):
    path = tmp_path / "none.wav"
    soundfile.write(path, np.zeros(0), 16_000)
    expect(path, "no samples", "record it again", action=probe)


@pytest.mark.parametrize("suffix", ["wav", "mp3", "flac", "raw", "csv"])
def test_non_audio(tmp_path, suffix):
    path = tmp_path / f"notes.{suffix}"
    path.write_text("patient,finding\n1,none\n" * 50)
    expect(path, "not audio", "convert it")
    path.write_bytes(np.random.default_rng(0).bytes(4_000))
    expect(path, "not audio", "convert it")


@pytest.mark.parametrize("keep", [0.95, 0.5, 0.05])
@pytest.mark.parametrize(
    ("suffix", "subtype"),
    [
        ("wav", "PCM_16"),
        ("wav", "FLOAT"),
        ("flac", "PCM_16"),
        ("ogg", "VORBIS"),
        ("ogg", "OPUS"),
        ("mp3", "MPEG_LAYER_III"),
    ],
)
def test_truncated(tmp_path, suffix, subtype, keep):
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 5 * 16_000)
    soundfile.write(path, noise, 16_000, subtype=subtype)
    whole = path.read_bytes()
    assert read(path).shape == (5 * 16_000,)
    path.write_bytes(whole[: int(keep * len(whole))])
    expect(path, "truncated", "copy it again")


def test_wav_written_to_a_pipe_is_whole(tmp_path):
    """Such files declare no or the largest possible length."""
    path = tmp_path / "piped.wav"
    soundfile.write(path, tone(440, 16_000, 1.0), 16_000)
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)
    path.write_bytes(content)
    assert read(path).shape == (16_000,)


def test_implausible_rate(tmp_path):
    path = tmp_path / "rate.wav"
    soundfile.write(path, tone(440, 16_000, 1.0), 16_000)
    content = bytearray(path.read_bytes())
    content[24:28] = struct.pack("<I", 7)
    path.write_bytes(content)
    expect(path, "7 Hz", "correct its header")


def test_hours_long(tmp_path):
    """Told by its header, refused whole, read in part; a sparse file stands for the hours."""
    path = tmp_path / "night.wav"
    soundfile.write(path, tone(440, 8_000, 2.0), 8_000)
    size = 2 * 8_000 * 3600 * 8
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = struct.pack("<I", size)
    path.write_bytes(content)
    with path.open("r+b") as file:
        file.truncate(at + 4 + size)
    assert probe(path).seconds == 8 * 3600
    expect(path, "8.0 h", "max_seconds")
    assert read(path, max_seconds=2).shape == (32_000,)


@pytest.mark.parametrize(
    ("waveform", "words"),
    [
        ([], ("no samples", "record it again")),
        ([0.5], ("single sample", "record it again")),
        ([0.0] * 9, ("digital silence", "record it again")),
        ([0.1, 0.2, np.nan], ("sample 2 is nan", "repair")),
        ([0.1, -np.inf, 0.2], ("sample 1 is -inf", "repair")),
        ([0.1, 1e20], ("1e+20", "damaged")),
    ],
)
def test_useless_waveforms(tmp_path, waveform, words):
    """Also when they come from a file."""
    samples = np.array(waveform, np.float32)
    expect("row 7", *words, action=lambda path: check_waveform(samples, path))
    if samples.size:
        path = tmp_path / "bad.wav"
        soundfile.write(path, samples, 16_000, subtype="FLOAT")
        expect(path, *words, action=lambda path: check_waveform(read(path), path))


def test_one_sample_at_another_rate(tmp_path):
    path = tmp_path / "one.wav"
    soundfile.write(path, np.array([0.5]), 48_000)
    expect(path, "sample", action=lambda path: check_waveform(read(path), path))


def test_error_survives_a_process_boundary():
    error = AudioError("a.wav", "is empty")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.path, copy.reason) == ("a.wav: is empty", "a.wav", "is empty")
