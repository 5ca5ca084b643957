"""Every registered encoder at sizes that compile in seconds."""

from medalign_jax.architecture import Architecture, architecture

_VIT = {
    "frames": 16, "patch": (4, 16), "width": 32, "depth": 2, "heads": 2,
    "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip
_SWIN = {
    "mels": 16, "spec_size": 32, "patch": 2, "embed_width": 8, "depths": (1, 1), "heads": (2, 4),
    "window": 4, "projection": 8,
}  # fmt: skip
_TOWER = {"mels": 16, "frames": 64, "width": 16, "depth": 2, "heads": 2, "mlp_width": 32}
_AST = {"frames": 32, "mels": 16, "patch": 8, "width": 16, "depth": 2, "heads": 2}
_FBANK = {"n_mels": 16, "pad_to": 32, "f_max": 8000.0}
_FEW = {"n_mels": 16}

# name -> changes of the encoder's sizes and of its front end
TOYS = {
    "opera_gt": (_VIT | {"position_grid": None, "decoder": "plain"}, {}),
    "vit_mae_small": (_VIT, {}),
    "opera_ct": (_SWIN, _FEW),
    "opera_ce": (
        {"frames": 40, "mels": 40, "stem": 8, "width": 16, "projection": 8,
         "stages": ((1, 3, 1, 8, 1), (2, 5, 2, 8, 2))},
        {"n_mels": 40},
    ),
    "audiomae": (_AST, _FBANK),
    "audiomae_pretrained": (
        _AST | {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2, "patch": 4}, _FBANK,
    ),
    "ast": (_AST | {"mlp_width": 32, "stride": (4, 4)}, _FBANK),
    "clap": (_SWIN, {}),
    "clap_fused": (_SWIN, {}),
    "whisper": (_TOWER, {}),
    "qwen2_audio": (_TOWER | {"output_width": 8}, {}),
    "qwen_omni_audio": (_TOWER | {"output_width": 8, "n_window": 10}, {}),
}  # fmt: skip

# One of each module: a gradient takes long to compile.
ONE_OF_EACH = [n for n in TOYS if n not in ("opera_gt", "audiomae", "clap_fused", "qwen2_audio")]


def toy(name: str) -> Architecture:
    """The encoder of that name, small."""
    return architecture(name, *TOYS[name])
