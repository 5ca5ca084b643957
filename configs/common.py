"""Blocks that the configs share. Every value can be changed with ``--config.block.key=value``."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def base() -> ConfigDict:
    """Data, encoder, mesh and loop, with AcuLa's published numbers."""
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(
        {
            "manifest": "",  # CSV, JSONL, Parquet, or a folder made by data.prepare; "" simulates
            "targets": (),  # further columns to keep
            "seconds": 8.1875,  # of a clip; 131,000 samples at 16 kHz, 256 frames of the log-mel
            "pad": "zero",  # zero, silence, repeat, tile or repeat_whole
            "random_crop": False,
            "one_per_subject": False,  # batches of different subjects, a recording each
            "max_seconds": 60.0,
            "max_bad_fraction": 0.01,
            "workers": 0,
            "simulated": 400,  # recordings to simulate where there is no manifest
            "simulated_seconds": 8.0,
            "simulated_kinds": ("heart", "lung"),
            "mix": 0,  # simulated recordings to add to the training split
        }
    )
    config.encoder = ConfigDict(
        {
            "name": "opera_gt",
            "source": "",  # Hub id, folder, file, workdir; "" starts from pre-training or random
            "overrides": ConfigDict(convert_dict=True),
            "front_end": ConfigDict(convert_dict=True),
            "random": False,  # start from random weights, whatever there is to start from
        }
    )
    config.augment = ConfigDict({})
    # auto: what the encoder was published with, else masked_spectrogram; also cola (OPERA-CT, -CE)
    config.loss = ConfigDict({"ssm": "auto"})
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.train = ConfigDict(
        {
            "batch_size": 48,
            "accumulate": 1,
            "epochs": 50,
            "steps": 0,  # goes before epochs
            "log_every": 10,
            "eval_every": 100,  # also saves
            "patience": 0,
        }
    )
    config.optimizer = ConfigDict(
        {
            "learning_rate": 1e-5,
            "schedule": "linear",
            "warmup_steps": 400,
            "weight_decay": 0.01,
            "clip": 1.0,
            "frozen": (),  # regexes of parameter paths that stay as they are
        }
    )
    config.evaluate = ConfigDict(
        {
            "enabled": True,
            "copies": True,  # look for near-copies among the recordings
            "pad": "repeat",
            "trim": False,
            # How tokens become the vector that is measured (models/pooling.py: mean_std, mean_max,
            # bands, bands_mean_std); alignment trains the published feature whatever is said here.
            "pooling": "mean",
            "layer": placeholder(int),  # block whose tokens are pooled; none: the last
        }
    )
    return config
