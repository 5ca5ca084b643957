"""AudioMAE, fine-tuned or with its decoder (`medalign_jax.models.encoders.audiomae`).

Upstream names are those of facebookresearch/AudioMAE: `models_vit.py` has `fc_norm` and `head`,
`models_mae.py` has `norm` and the decoder; a model's tree has the one or the other. OPERA-GT was
made from the second, so its lines are those of `opera_gt`.
"""

from medalign_jax.weights.table import Ignore, Table
from medalign_jax.weights.tables import opera_gt
from medalign_jax.weights.tables.lines import norm

TABLE = Table(
    name="audiomae",
    prefixes=opera_gt.TABLE.prefixes,
    rules=(
        *opera_gt.TABLE.rules,
        *norm("fc_norm", "fc_norm"),
    ),
    ignores=(
        Ignore("{prefix}head.*", "classifier of the fine-tuning; features are read before it"),
        Ignore("{prefix}decoder_blocks.{i}.attn_mask", "made anew from the grid"),
        Ignore("{prefix}decoder_blocks.{i}.attn.relative_coordinates_log", "made anew"),
    ),
)

SHARDING = opera_gt.SHARDING
