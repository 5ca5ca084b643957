"""What a published model's `preprocessor_config.json` says of how sound becomes features.

transformers' feature extractors are made from that file, and our front ends from the same numbers:
those that a front end has are taken over, and a setting that none of it can follow is refused.
Other keys (of pictures, of batches) have no say in the features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from medalign_jax.core.errors import UserError

NAMES = ("preprocessor_config.json", "processor_config.json")


@dataclasses.dataclass(frozen=True)
class _Keys:
    """Keys of one feature extractor.

    Attributes:
      numbers: key -> field of our front end that it is.
      sizes: key -> field of the encoder's published sizes that it has to equal.
      fixed: key -> the one value that our front end is made for.
    """

    numbers: Mapping[str, str]
    sizes: Mapping[str, str]
    fixed: Mapping[str, Any]


_KEYS: Mapping[str, _Keys] = {
    "kaldi_fbank": _Keys(  # ASTFeatureExtractor, whose frames are 400 samples at whatever rate
        numbers={"mean": "mean", "std": "std"},
        sizes={"num_mel_bins": "mels", "max_length": "frames"},
        fixed={"sampling_rate": 16_000, "feature_size": 1},
    ),
    "whisper_mel": _Keys(  # WhisperFeatureExtractor
        numbers={"sampling_rate": "sample_rate", "hop_length": "hop", "n_fft": "n_fft"},
        sizes={"feature_size": "mels"},
        fixed={"padding_value": 0, "dither": 0},
    ),
    "clap_mel": _Keys(  # ClapFeatureExtractor
        numbers={
            "sampling_rate": "sample_rate", "hop_length": "hop", "fft_window_size": "n_fft",
            "frequency_min": "f_min", "frequency_max": "f_max",
        },
        sizes={"feature_size": "mels"},
        fixed={"top_db": None, "padding": "repeatpad", "padding_value": 0, "max_length_s": 10},
    ),
}  # fmt: skip


def front_end_numbers(front_end: str, said: Mapping[str, Any], sizes: Any) -> dict[str, Any]:
    """Fields of a front end as a feature extractor's settings have them.

    Args:
      front_end: its name in `frontend.FRONT_ENDS`.
      said: the settings, parsed; keys that are not there keep our numbers.
      sizes: the encoder's config as it was published.

    Returns:
      field -> number.

    Raises:
      UserError: a setting that the front end or the model does not have, or no number where one
        belongs; names the key, both values and what to do.
    """
    keys = _KEYS.get(front_end)
    if keys is None:
        return {}
    for key, field in keys.sizes.items():
        if key in said and said[key] != (own := getattr(sizes, field)):
            raise _refused(key, said[key], f"the model's config.json asks for {own!r}")
    fixed = dict(keys.fixed)
    if front_end == "clap_mel":  # the kind of filters
        fixed["truncation"] = "fusion" if sizes.fusion else "rand_trunc"
    for key, only in fixed.items():
        if key in said and said[key] != only:
            raise _refused(key, said[key], f"this model's front end has only {only!r}")
    found = {field: _number(key, said[key]) for key, field in keys.numbers.items() if key in said}
    if front_end == "whisper_mel":
        _check_chunk(said, found, sizes)
    if front_end == "kaldi_fbank" and not said.get("do_normalize", True):
        found |= {"mean": 0.0, "std": 0.5}  # (x - mean) / (2 std) is x
    return found


def _check_chunk(said: Mapping[str, Any], found: Mapping[str, Any], sizes: Any) -> None:
    """The published use fills clips up to `chunk_length` seconds, which the model has to read."""
    seconds, most = said.get("chunk_length"), sizes.most_frames
    if seconds is None or most is None:
        return
    frames = _number("chunk_length", seconds) * found.get("sample_rate", 16_000)
    frames /= found.get("hop", 160)
    if frames != most:
        raise _refused("chunk_length", seconds, f"the model reads {most} frames, not {frames:g}")


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refused(key, value, "a number belongs there")
    return value


def _refused(key: str, value: Any, why: str) -> UserError:
    return UserError(
        f"{NAMES[0]} has {key}={value!r}, and {why}: correct the file where it is wrong; if the "
        "model was trained so, its features cannot be made here"
    )
