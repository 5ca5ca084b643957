"""Blocks that the configs share. Every value can be changed with ``--config.block.key=value``."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def base() -> ConfigDict:
    """Data, encoder, mesh and loop, with AcuLa's published numbers."""
    config = ConfigDict()
    config.seed = 0  # of everything that is drawn at random
    config.data = ConfigDict(
        {
            # CSV, JSONL, Parquet, or a folder made by data.recordings.prepare; "" simulates
            "manifest": "",
            "targets": (),  # further columns to keep
            "seconds": 8.1875,  # of a clip; 131,000 samples at 16 kHz, 256 frames of the log-mel
            "pad": "zero",  # zero, silence, repeat, tile or repeat_whole
            # a clip from anywhere in the recording, anew each epoch; else its beginning
            "random_crop": False,
            "one_per_subject": False,  # batches of different subjects, a recording each
            "max_seconds": 60.0,  # what is read of a recording
            "max_bad_fraction": 0.01,  # share of the rows that may be unusable
            "workers": 0,  # processes that read and decode beside the one that trains
            "simulated": 400,  # recordings to simulate where there is no manifest
            "simulated_seconds": 8.0,  # length of each
            "simulated_kinds": ("heart", "lung"),  # of heart, lung, valves
            "mix": 0,  # simulated recordings to add to the training split
        }
    )
    config.encoder = ConfigDict(
        {
            "name": "opera_gt",  # architecture: python -m medalign_jax.models
            "source": "",  # Hub id, folder, file, workdir; "" starts from pre-training or random
            "overrides": ConfigDict(convert_dict=True),  # settings of the architecture
            "front_end": ConfigDict(convert_dict=True),  # settings of its spectrogram
            "random": False,  # start from random weights, whatever there is to start from
        }
    )
    # What happens to clips in training (audio/augment.py): shares of the clips, then settings.
    config.augment = ConfigDict(
        {
            "gain": 0.0,  # share that is made louder or softer
            "peak_normalise": 0.0,  # share whose peak is set
            "low_pass": 0.0,  # share that loses its high frequencies
            "high_pass": 0.0,  # share that loses its low frequencies
            "noise": 0.0,  # share that gets white noise
            "time_shift": 0.0,  # share that is moved in time
            "frame_mask": 0.0,  # share with masked frames (SpecAugment)
            "band_mask": 0.0,  # share with masked frequencies (SpecAugment)
            "gain_db": (-12.0, 12.0),  # drawn between
            "peak": 1.0,  # of peak_normalise
            "low_pass_hz": (800.0, 6000.0),  # cut-off, drawn between
            "high_pass_hz": (30.0, 150.0),  # cut-off, drawn between
            "filter_order": 8,  # of both
            "noise_snr_db": (10.0, 40.0),  # drawn between
            "shift_seconds": 1.0,  # at most
            "shift_circular": True,  # what leaves at one end comes in at the other; else silence
            "frame_masks": 2,  # stretches
            "frame_mask_width": 24,  # frames of a stretch, at most
            "band_masks": 2,  # stretches
            "band_mask_width": 8,  # mel bands of a stretch, at most
            "mask_value": 0.0,  # of what is masked
        }
    )
    # auto: what the encoder was published with, else masked_spectrogram; also cola (OPERA-CT, -CE)
    config.loss = ConfigDict({"ssm": "auto"})
    config.mesh = ConfigDict(
        {
            "data": -1,  # devices that the batch is spread over; -1: all that are left
            "fsdp": 1,  # devices that weights and batch are spread over
            "tensor": 1,  # devices that share each layer of a language model
        }
    )
    config.train = ConfigDict(
        {
            "batch_size": 48,  # of all devices together
            "accumulate": 1,  # parts that a batch is computed in; the result is that of one
            "epochs": 50,  # passes over the training split
            "steps": 0,  # 0: by epochs; else takes precedence over them
            "log_every": 10,  # steps
            "eval_every": 100,  # also saves
            "patience": 0,  # evaluations without a better one before the run ends; 0: never
            "tensorboard": True,  # events in WORKDIR/tensorboard
            "wandb": "",  # project at Weights & Biases that metrics go to as well; "": nowhere
        }
    )
    config.optimizer = ConfigDict(
        {
            "learning_rate": 1e-5,  # at its highest
            "schedule": "linear",  # after the warm-up: linear or cosine to 0, or constant
            "warmup_steps": 400,  # in which the rate rises from 0
            "weight_decay": 0.01,  # of AdamW
            "clip": 1.0,  # largest norm of the gradient
            "b1": 0.9,  # of AdamW
            "b2": 0.999,  # of AdamW
            "frozen": (),  # regexes of parameter paths that stay as they are
            "no_decay": (),  # regexes of parameter paths without weight decay
            "multipliers": (),  # (regex of parameter paths, factor on their rate), first match wins
        }
    )
    config.evaluate = ConfigDict(
        {
            "enabled": True,  # False trains and exports without measuring
            "copies": True,  # look for near-copies among the recordings
            "pad": "repeat",  # of recordings that are shorter than a window, as data.pad
            "trim": False,  # cut silence from both ends first, as OPERA does
            # How tokens become the vector that is measured (models/layers/pooling.py: mean_std,
            # mean_max, bands, bands_mean_std); alignment trains the published feature whatever is
            # said here.
            "pooling": "mean",
            "layer": placeholder(int),  # block whose tokens are pooled; none: the last
        }
    )
    return config
