"""Masked-reconstruction pre-training of an audio encoder.

Variants:
  (none)  OPERA-GT's published recipe: Adam 1e-4, x0.99 per epoch is replaced by a constant rate
  :small  the small encoder of configs/acula.py:small
  :demo   :small on simulated auscultation
"""

from ml_collections import ConfigDict

from configs import acula
from configs.common import base

VARIANTS = ("", "small", "demo")


def get_config(variant: str = "") -> ConfigDict:
    """The config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/pretrain.py has no variant {variant!r}; there are {VARIANTS}")
    config = base()
    config.method = "pretrain"  # what is run: acula, distill, pretrain, textualize
    if variant:
        small = acula.get_config(variant)
        config.seed = small.seed
        for block in ("data", "encoder", "train", "optimizer", "augment"):
            config[block] = small[block]
        config.update(small.pretrain.changes)
        return config
    config.train.update({"batch_size": 64, "epochs": 100, "eval_every": 500})
    config.optimizer.update(
        {"learning_rate": 1e-4, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0}
    )
    config.data.random_crop = True
    return config
