"""The config of test_processes.py: a tiny AcuLa run on simulated hearts."""

from tests.runs.test_end_to_end import tiny


def get_config():
    config = tiny()
    config.data.update({"simulated_seconds": 2.0, "simulated_kinds": ("heart",)})
    config.supervised.enabled = False
    # How its vectors are measured does not depend on who embedded them.
    config.evaluate.update(
        {"probes": ("linear",), "per_class": 0, "baselines": ("majority", "random")}
    )
    return config
