"""Probes: small models fitted on frozen embeddings.

`linear`, `mlp`, `knn` and `opera` share one signature: features (N, D) and problems on their rows
in, a prediction of each problem's test rows out. `linear` is solved to convergence and is what
headline tables use; `opera` is the published protocol, for comparison with published numbers.
"""

from medalign_jax.evaluate.probes.knn import knn
from medalign_jax.evaluate.probes.linear import LinearModel, fit_linear, linear
from medalign_jax.evaluate.probes.mlp import MLPConfig, mlp
from medalign_jax.evaluate.probes.opera import opera
from medalign_jax.evaluate.probes.opera_protocol import (
    REGRESSION,
    ProbeScores,
    RegressionScores,
    class_indices,
    classification_probe,
    few_shot_draws,
    regression_probe,
)
from medalign_jax.evaluate.probes.opera_training import ProbeConfig
from medalign_jax.evaluate.probes.problem import Prediction, ProbeError, Problem

PROBES = {"linear": linear, "mlp": mlp, "knn": knn, "opera": opera}
VALIDATED = frozenset({"opera"})  # choose on validation rows; the others do not read them

__all__ = [
    "PROBES",
    "REGRESSION",
    "VALIDATED",
    "LinearModel",
    "MLPConfig",
    "Prediction",
    "ProbeConfig",
    "ProbeError",
    "ProbeScores",
    "Problem",
    "RegressionScores",
    "class_indices",
    "classification_probe",
    "few_shot_draws",
    "fit_linear",
    "knn",
    "linear",
    "mlp",
    "opera",
    "regression_probe",
]
