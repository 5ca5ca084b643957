"""Probes: small models fitted on frozen embeddings."""

from medalign_jax.evaluate.probes.opera_protocol import (
    REGRESSION,
    ProbeConfig,
    ProbeError,
    ProbeScores,
    RegressionScores,
    class_indices,
    classification_probe,
    few_shot_draws,
    regression_probe,
)

__all__ = [
    "REGRESSION",
    "ProbeConfig",
    "ProbeError",
    "ProbeScores",
    "RegressionScores",
    "class_indices",
    "classification_probe",
    "few_shot_draws",
    "regression_probe",
]
