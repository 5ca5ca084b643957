"""Architectures: one file each; a model returns `(output, intermediates)`.

`ENCODERS` is the one place where an audio encoder is made known. To add one, write
`models/<file>.py` and `weights/tables/<file>.py`, and one line below.
"""

from typing import NamedTuple


class EncoderEntry(NamedTuple):
    """Where an encoder's parts are: import paths `module:attribute`, so nothing is loaded here.

    Attributes:
      config: a frozen dataclass with its sizes.
      module: the Linen module built from that config.
      table: the mapping table of its published weights; `SHARDING` stands beside it.
      front_end: name in `medalign_jax.audio.frontend.FRONT_ENDS` of the input it was made for.
    """

    config: str
    module: str
    table: str
    front_end: str


_VIT_MAE = "medalign_jax.models.vit_mae"
_OPERA_GT_TABLE = "medalign_jax.weights.tables.opera_gt:TABLE"

ENCODERS: dict[str, EncoderEntry] = {
    "opera_gt": EncoderEntry(
        f"{_VIT_MAE}:OPERA_GT", f"{_VIT_MAE}:ViTMAE", _OPERA_GT_TABLE, "log_mel"
    ),
    "vit_mae_small": EncoderEntry(
        f"{_VIT_MAE}:SMALL", f"{_VIT_MAE}:ViTMAE", _OPERA_GT_TABLE, "log_mel"
    ),
}
