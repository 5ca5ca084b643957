"""Audio language models: Qwen2.5-Omni's thinker and Qwen2-Audio, tower and text together.

Two generations of names, of which export writes the first:

                     published files                 transformers 5's modules
  Qwen2.5-Omni       thinker.audio_tower.            thinker.model.audio_tower.
                     thinker.model.                  thinker.model.language_model.
                     thinker.lm_head.weight          thinker.lm_head.weight
  Qwen2-Audio        audio_tower.                    model.audio_tower.
                     multi_modal_projector.linear.   model.multi_modal_projector.linear.
                     language_model.model.           model.language_model.
                     language_model.lm_head.weight   lm_head.weight

A thinker by itself has the same names without ``thinker.``.
"""

from medalign_jax.models.audio_lm import AudioLMConfig
from medalign_jax.weights.table import Ignore, Rule, Table
from medalign_jax.weights.tables import decoder, qwen_omni_audio
from medalign_jax.weights.tables.lines import inside


def table(config: AudioLMConfig) -> Table:
    """The table of a model; its text part may be without head, but not truncated."""
    return _omni(config) if config.kind == "qwen2_5_omni" else _qwen2_audio(config)


def _omni(config: AudioLMConfig) -> Table:
    towers = ("{prefix}audio_tower.", "{prefix}model.audio_tower.")
    texts = ("{prefix}model.", "{prefix}model.language_model.")
    head, ignored = _head(config, ("{prefix}lm_head.weight",), texts[0])
    return Table(
        name="qwen2_5_omni",
        prefixes=("thinker.", ""),
        rules=(
            *inside(qwen_omni_audio.QWEN2_5_OMNI_TABLE.rules, towers, "audio"),
            *inside(decoder.body(config.text), texts, "text"),
            *head,
        ),
        ignores=(
            *ignored,
            *(
                Ignore(f"{tower}audio_bos_eos_token.weight", "the forward pass never reads it")
                for tower in towers
            ),
            *(Ignore(f"{text}*rotary_emb.inv_freq", "frequencies, made anew") for text in texts),
            Ignore("{prefix}visual.*", "the vision tower; only audio and text are read"),
            Ignore("{prefix}model.visual.*", "the vision tower; only audio and text are read"),
            Ignore("talker.*", "the talker; only text is written"),
            Ignore("token2wav.*", "the talker's vocoder; only text is written"),
        ),
    )


def _qwen2_audio(config: AudioLMConfig) -> Table:
    heads = ("language_model.lm_head.weight", "lm_head.weight")
    texts = ("language_model.model.", "model.language_model.")
    head, ignored = _head(config, heads, texts[0])
    towers = ("audio_tower.", "model.audio_tower.")
    return Table(
        name="qwen2_audio",
        rules=(
            *inside(qwen_omni_audio.QWEN2_AUDIO_TABLE.rules, towers, "audio"),
            *inside(decoder.body(config.text), texts, "text"),
            *head,
        ),
        ignores=(
            *ignored,
            *(Ignore(f"{text}*rotary_emb.inv_freq", "frequencies, made anew") for text in texts),
        ),
    )


def _head(
    config: AudioLMConfig, names: tuple[str, ...], text: str
) -> tuple[tuple[Rule, ...], tuple[Ignore, ...]]:
    """The line of the head, or why there is none."""
    if config.text.tied:
        copy = f"{text}embed_tokens.weight"
        return (), tuple(Ignore(name, "tied", equal_to=copy) for name in names)
    if not config.text.head:
        return (), tuple(Ignore(name, "only hidden states are read") for name in names)
    return inside((decoder.head(config.text, names),), ("{prefix}",), "text"), ()


# Path regex -> mesh axes of the last dimensions (see core/mesh.py); first match wins. The two
# parts name their layers apart.
SHARDING = (*decoder.SHARDING, *qwen_omni_audio.SHARDING)
