"""Audio from file to features.

Host (NumPy): `io` reads and resamples, `clip` trims, cuts and pads.
Device (JAX, jitted, batched): `augment` changes waveforms and features, `frontend` makes
log-mel features out of the shared steps in `spectrum`.
"""

from medalign_jax.audio.augment import Augment
from medalign_jax.audio.frontend import FRONT_ENDS, LogMel, front_end
from medalign_jax.audio.io import AudioError, AudioInfo, check_waveform, probe, read

__all__ = [
    "FRONT_ENDS",
    "AudioError",
    "AudioInfo",
    "Augment",
    "LogMel",
    "check_waveform",
    "front_end",
    "probe",
    "read",
]
