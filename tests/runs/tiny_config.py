"""A tiny AcuLa run on simulated sounds; `get_config` is that of test_processes.py."""

from configs import acula


def tiny():
    config = acula.get_config("demo")
    config.data.update(
        {"simulated": 60, "simulated_seconds": 2.0, "seconds": 31 * 512 / 16_000, "mix": 0}
    )
    config.encoder.overrides.update(
        {"frames": 32, "patch": (8, 16), "width": 32, "depth": 1, "heads": 2,
         "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
    )  # fmt: skip
    config.reports.wordings = 2
    config.teacher.update({"layer": 1, "whiten": 0.95})  # one block of six
    config.loss.update({"audio_head": "mlp", "text_head": "mlp", "hidden": 32, "out": 16})
    config.train.update({"batch_size": 8, "steps": 4, "eval_every": 2, "log_every": 1})
    for stage in (config.pretrain, config.supervised):
        stage.changes.train.update({"batch_size": 8, "steps": 4, "eval_every": 2})
    config.evaluate.update({"per_class": 2, "draws": 3, "seeds": 2})
    return config


def get_config():
    config = tiny()
    config.data.update({"simulated_seconds": 2.0, "simulated_kinds": ("heart",)})
    config.supervised.enabled = False
    # How its vectors are measured does not depend on who embedded them.
    config.evaluate.update(
        {"probes": ("linear",), "per_class": 0, "baselines": ("majority", "random")}
    )
    return config
