"""Files whose headers do not say, or say wrongly, how long they are: read whole or refused."""

import os
import struct

import numpy as np
import pytest
import soundfile

from medalign_jax.audio import AudioError, mpeg, ogg, probe, read

RATE = 16_000
SAMPLES = 6 * RATE


@pytest.fixture(scope="module")
def sound():
    """A tone, then noise: a variable bit rate has to vary."""
    rng = np.random.default_rng(0)
    t = np.arange(SAMPLES) / RATE
    wave = 0.3 * np.sin(2 * np.pi * 440 * t)
    wave[SAMPLES // 2 :] += 0.3 * rng.standard_normal(SAMPLES // 2)
    return wave.clip(-1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def made(sound, tmp_path_factory):
    """Makes the bytes of a file of a format."""
    path = tmp_path_factory.mktemp("made") / "file"

    def make(wave=sound, **options):
        soundfile.write(path, wave, RATE, **options)
        return path.read_bytes()

    return make


def stored(tmp_path, content):
    path = tmp_path / "recording"
    path.write_bytes(content)
    return path


def refusal(tmp_path, content, action=probe):
    with pytest.raises(AudioError) as caught:
        action(stored(tmp_path, content))
    return caught.value.reason


def put(content, name, size, order="<"):
    """The content with another length in the chunk of that name."""
    at = content.index(name) + 4
    return content[:at] + struct.pack(order + "I", size) + content[at + 4 :]


@pytest.mark.parametrize("riff", [None, 0, 36, 0xFFFF_FFFF])
@pytest.mark.parametrize(
    "size", [0x7FFF_F000, 0x7FFF_0000, 0x8000_0000, 0xFFFF_F000, 0xFFFF_FFFF, 0x7FFF_FFDB, 0]
)
def test_wav_from_a_pipe_lasts_as_long_as_it_lasts(tmp_path, made, sound, size, riff):
    content = put(made(format="WAV", subtype="FLOAT"), b"data", size)
    if riff is not None:
        content = put(content, b"RIFF", riff)
    path = stored(tmp_path, content)
    assert probe(path).frames == SAMPLES
    np.testing.assert_array_equal(read(path), sound)


@pytest.mark.parametrize(
    ("options", "name", "sizes"),
    [
        ({"format": "AIFF"}, b"SSND", (0x7F00_0008, 0, 0xFFFF_FFFF)),
        ({"format": "AU"}, b"\x00\x00\x00\x18", (0xFFFF_FFFF, 0)),
    ],
)
def test_aiff_and_au_from_a_pipe(tmp_path, made, options, name, sizes):
    for size in sizes:
        path = stored(tmp_path, put(made(**options), name, size, ">"))
        assert probe(path).frames == len(read(path)) == SAMPLES


@pytest.mark.parametrize("size", [0, (1 << 64) - 1])
def test_rf64_from_a_pipe(tmp_path, made, size):
    content = made(format="RF64")
    at = content.index(b"ds64") + 16
    path = stored(tmp_path, content[:at] + struct.pack("<Q", size) + content[at + 8 :])
    assert probe(path).frames == len(read(path)) == SAMPLES


def test_a_length_of_zero_that_is_meant(tmp_path, made):
    """Chunks follow up to the last byte, but no sound; what looks like none is sound."""
    content = put(made(format="WAV"), b"data", 0)
    header = content[: content.index(b"data") + 8]
    assert "no samples" in refusal(tmp_path, header + b"LIST" + struct.pack("<I", 4) + b"INFO")
    assert probe(stored(tmp_path, header + bytes(3200))).frames == 1600


def test_one_byte_too_long_is_the_byte_that_fills_up(tmp_path, made):
    content = made(format="WAV")
    path = stored(tmp_path, put(content, b"data", 2 * SAMPLES + 1))
    assert probe(path).frames == len(read(path)) == SAMPLES
    assert "truncated" in refusal(tmp_path, put(content, b"data", 2 * SAMPLES + 2))


@pytest.mark.parametrize(
    "options",
    [
        {"format": "WAV"}, {"format": "WAV", "endian": "BIG"}, {"format": "WAVEX"},
        {"format": "RF64"}, {"format": "W64"}, {"format": "AIFF"},
        {"format": "AIFF", "endian": "LITTLE"}, {"format": "AU"},
        {"format": "AU", "endian": "LITTLE"}, {"format": "NIST"},
        {"format": "WAV", "subtype": "IMA_ADPCM"}, {"format": "AIFF", "subtype": "ULAW"},
    ],
    ids=lambda options: "-".join(options.values()),
)  # fmt: skip
def test_half_a_file_is_seen_in_every_container(tmp_path, made, options):
    whole = made(**options)
    assert len(read(stored(tmp_path, whole))) == pytest.approx(SAMPLES, abs=1024)
    reason = refusal(tmp_path, whole[: len(whole) // 2])
    assert reason.startswith("is truncated: its header promises") and "copy it again" in reason


def test_samples_behind_the_end_of_the_file(tmp_path, made):
    content = made(format="AU")
    for promised in (0, 2 * SAMPLES):
        header = struct.pack(">II", len(content) + 1, promised)
        reason = refusal(tmp_path, content[:4] + header + content[12:])
        assert f"samples from byte {len(content) + 1} on, and it has {len(content)}" in reason


@pytest.mark.parametrize(
    "kind", ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "NIST", "FLAC", "CAF"]
)
def test_files_in_one(tmp_path, made, kind):
    content = made(format=kind)
    assert probe(stored(tmp_path, content)).frames == SAMPLES
    reason = refusal(tmp_path, content + content)
    assert f"a second recording from byte {len(content)} on" in reason and "into two" in reason


@pytest.mark.parametrize(("kind", "order"), [("WAV", "<"), ("RF64", "<"), ("AIFF", ">")])
def test_files_in_one_behind_a_list_of_tags(tmp_path, made, kind, order):
    tags = b"LIST" + struct.pack(order + "I", 40) + b"INFO" + bytes(36)
    content = made(format=kind) + tags
    assert probe(stored(tmp_path, content)).frames == SAMPLES
    reason = refusal(tmp_path, content + content)
    assert f"a second recording from byte {len(content)} on" in reason


@pytest.mark.parametrize(("kind", "frames"), [("WAV", SAMPLES), ("AU", SAMPLES), ("W64", None),
                                              ("NIST", None)])  # fmt: skip
def test_what_follows_the_samples_is_not_sound(tmp_path, made, kind, frames):
    """libsndfile takes what lies behind the samples of the last two for more of them."""
    content = made(format=kind) + bytes(5000)
    if frames is None:
        assert "holds 5000 bytes behind its samples" in refusal(tmp_path, content)
    else:
        assert probe(stored(tmp_path, content)).frames == frames


def test_caf_is_whole_or_refused(tmp_path, made):
    whole = made(format="CAF")
    assert probe(stored(tmp_path, whole)).frames == SAMPLES
    reason = refusal(tmp_path, whole[: len(whole) // 2])
    assert reason.startswith(f"is truncated: its header promises {2 * SAMPLES + 4} bytes")


@pytest.mark.parametrize("kind", ["SVX", "VOC", "MAT5", "PAF"])
def test_a_container_that_does_not_show_its_length_is_refused(tmp_path, made, kind):
    reason = refusal(tmp_path, made(format=kind, subtype="PCM_16"))
    assert reason.startswith(f"is a {kind} file") and "ffmpeg -i FILE NEW.wav" in reason


@pytest.mark.parametrize("tag", [b"", b"ID3\4\0\0\0\0\1\0" + bytes(128)])
def test_flac_of_unknown_length_is_counted(tmp_path, made, sound, tag):
    content = bytearray(made(format="FLAC"))
    content[21] &= 0xF0
    content[22:26] = bytes(4)  # total samples of STREAMINFO
    path = stored(tmp_path, tag + content)
    assert probe(path).frames == SAMPLES
    np.testing.assert_allclose(read(path), sound, rtol=0, atol=1e-4)
    assert len(read(path, max_seconds=2)) == 2 * RATE
    assert "truncated" in refusal(tmp_path, bytes(content[: len(content) // 2]), read)


@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
def test_mp3_that_does_not_tell_its_length_is_counted(tmp_path, made, mode):
    """The same samples as with the header, less the decoder's own delay."""
    whole = made(format="MP3", bitrate_mode=mode, compression_level=0.5)
    frames = mpeg.parse(whole).frames
    assert len({frame.size for frame in frames}) > 1 or mode == "CONSTANT"
    path = stored(tmp_path, whole[frames[0].start :])
    assert mpeg.parse(path.read_bytes()).declared is None
    assert probe(path).frames == len(read(path)) == len(frames) * 576 - 529
    told = read(stored(tmp_path, whole))
    assert told.shape == (SAMPLES,)
    counted = read(stored(tmp_path, whole[frames[0].start :]))
    np.testing.assert_allclose(counted[576:][:SAMPLES], told, rtol=0, atol=1e-4)


def test_mp3_with_the_header_of_fraunhofer(tmp_path, made):
    """libsndfile does not read it, and would guess."""
    whole = made(format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    frames = mpeg.parse(whole).frames
    silent = bytearray(whole[: frames[0].start])
    silent[4:] = bytes(len(silent) - 4)
    silent[36:54] = b"VBRI" + struct.pack(">HHHII", 1, 0, 0, len(whole), len(frames))
    path = stored(tmp_path, bytes(silent) + whole[frames[0].start :])
    assert probe(path).frames == len(frames) * 576 - 529


def test_mp3_files_in_one(tmp_path, made):
    """With headers the second would not be read; without, and with tags, they are one."""
    whole = made(format="MP3")
    frames = mpeg.parse(whole).frames
    reason = refusal(tmp_path, whole + whole)
    assert "declares" in reason and "several files" in reason and "ffmpeg" in reason
    bare = whole[frames[0].start :]
    path = stored(tmp_path, bare + b"ID3\4\0\0\0\0\1\0" + bytes(128) + bare + b"TAG" + bytes(125))
    assert probe(path).frames == len(read(path)) == 2 * len(frames) * 576 - 529


def test_mp3_that_is_cut_or_damaged(tmp_path, made):
    whole = made(format="MP3")
    frames = mpeg.parse(whole).frames
    cut = frames[50].start
    assert "truncated" in refusal(tmp_path, whole[:cut])
    assert "truncated" in refusal(tmp_path, whole[frames[0].start : cut + 9])
    for silent in (whole[: frames[0].start], whole[: frames[0].start] + b"tail" * 9):
        assert "there is none" in refusal(tmp_path, silent)
    damaged = whole[:cut] + b"\0" + whole[cut + 1 :]
    assert f"{frames[50].size} bytes at byte {cut} are not frames" in refusal(tmp_path, damaged)
    bare = whole[frames[0].start :]
    assert probe(stored(tmp_path, bare + b"tail" * 99)).frames == len(frames) * 576 - 529
    assert "are not frames" in refusal(tmp_path, bare + b"\xff" * (1 << 18))


def ogg_pages(content):
    starts = [at for at in range(len(content)) if content.startswith(b"OggS", at)]
    return [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]


def signed(page):
    page = bytearray(page)
    page[22:26] = ogg._checksum(page)
    return bytes(page)


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_ogg_without_the_flag_of_its_end_is_whole(tmp_path, made, codec):
    whole = made(format="OGG", subtype=codec)
    *pages, last = ogg_pages(whole)
    path = stored(tmp_path, whole)
    wanted = read(path)
    path = stored(tmp_path, b"".join(pages) + signed(last[:5] + b"\0" + last[6:]))
    assert probe(path).frames == SAMPLES
    np.testing.assert_array_equal(read(path), wanted)


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_ogg_that_is_damaged_is_refused(tmp_path, made, codec):
    whole = made(format="OGG", subtype=codec)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16
    assert "does not match its checksum" in refusal(tmp_path, bytes(flipped))
    pages = ogg_pages(whole)
    assert "are missing" in refusal(tmp_path, b"".join(pages[:-3] + pages[-2:]))
    assert "begins no page" in refusal(tmp_path, b"".join([*pages[:-2], b"junk" * 9, *pages[-2:]]))
    assert "truncated" in refusal(tmp_path, b"".join(pages[:-1]) + pages[-1][:-1])
    assert probe(stored(tmp_path, whole + b"junk" * 9)).frames == SAMPLES


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_ogg_with_a_second_recording_is_refused(tmp_path, made, sound, codec):
    one = made(format="OGG", subtype=codec)
    other = made(sound[:RATE], format="OGG", subtype=codec)
    renamed = b"".join(signed(page[:14] + b"abcd" + page[18:]) for page in ogg_pages(other))
    reason = refusal(tmp_path, one + renamed)
    assert f"second recording from byte {len(one)} on" in reason
    assert "ffmpeg" in reason and "copy it again" not in reason


def test_a_name_that_is_not_utf8(tmp_path, made):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/souffl\xe9.wav")
    with open(path, "wb") as file:
        file.write(made(format="WAV"))
    assert probe(path).frames == len(read(path)) == SAMPLES
    with open(path, "wb") as file:
        file.write(b"no sound")
    with pytest.raises(AudioError) as caught:
        read(path)
    assert caught.value.path == f"{tmp_path}/souffl\\xe9.wav"
    str(caught.value).encode("utf-8")
