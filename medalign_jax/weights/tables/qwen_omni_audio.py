"""Audio towers of Qwen2-Audio and Qwen2.5-Omni, bare or inside their language models.

Two generations of names: those of the published files (``audio_tower.``, ``thinker.audio_tower.``)
and those of transformers 5's modules (``model.audio_tower.``, ``thinker.model.audio_tower.``).
"""

from medalign_jax.weights.table import LINEAR, Ignore, Rule, Table
from medalign_jax.weights.tables.lines import norm
from medalign_jax.weights.tables.whisper import BODY, POSITIONS
from medalign_jax.weights.tables.whisper import SHARDING as _WHISPER_SHARDING

_PROJECTOR = "multi_modal_projector.linear"
_TEXT = "the language model is read by itself"

QWEN2_AUDIO_TABLE = Table(
    name="qwen2_audio",
    prefixes=("audio_tower.", "model.audio_tower.", ""),
    rules=(
        *BODY,
        POSITIONS,
        *norm("layer_norm", "norm"),
        Rule((f"{_PROJECTOR}.weight", f"model.{_PROJECTOR}.weight"), "proj/kernel", LINEAR),
        Rule((f"{_PROJECTOR}.bias", f"model.{_PROJECTOR}.bias"), "proj/bias"),
    ),
    ignores=(
        Ignore("language_model.*", _TEXT),
        Ignore("model.language_model.*", _TEXT),
        Ignore("lm_head.weight", _TEXT),
    ),
)

_THINKERS = ("thinker.", "thinker.model.", "", "model.")


def _of_thinker(part: str, reason: str) -> tuple[Ignore, ...]:
    return tuple(Ignore(f"{thinker}{part}", reason) for thinker in _THINKERS)


QWEN2_5_OMNI_TABLE = Table(
    name="qwen2_5_omni_audio",
    prefixes=(*(f"{thinker}audio_tower." for thinker in _THINKERS), ""),
    rules=(
        *BODY,
        *norm("ln_post", "norm"),
        Rule("{prefix}proj.weight", "proj/kernel", LINEAR),
        Rule("{prefix}proj.bias", "proj/bias"),
    ),
    ignores=(
        Ignore("{prefix}audio_bos_eos_token.weight", "the published forward pass never reads it"),
        *_of_thinker("visual.*", "vision side; only audio is read"),
        *_of_thinker("language_model.*", _TEXT),
        # The published files call the language model "model", transformers 5 everything.
        *(
            Ignore(f"{thinker}model.{part}", _TEXT)
            for thinker in ("thinker.", "")
            for part in ("embed_tokens.*", "layers.*", "norm.*")
        ),
        Ignore("thinker.lm_head.weight", _TEXT),
        Ignore("lm_head.weight", _TEXT),
        Ignore("talker.*", "speech output"),
        Ignore("token2wav.*", "speech output"),
    ),
)

SHARDING = (
    (r"proj/kernel$", ("fsdp", "tensor")),
    (r"proj/bias$", ("tensor",)),
    *_WHISPER_SHARDING,
)
