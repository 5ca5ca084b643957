"""Projection heads under the names of AcuLa's released code."""

from __future__ import annotations

from medalign_jax.weights.table import LINEAR, Rule, Table

TABLE = Table(
    name="projection heads",
    rules=tuple(
        rule
        for side in ("audio_last", "text", *(f"audio_{layer:02d}" for layer in range(64)))
        for part, number in (("hidden", 0), ("out", 3))
        for rule in (
            Rule(f"{side}.layers.{number}.weight", f"{side}/{part}/kernel", LINEAR),
            Rule(f"{side}.layers.{number}.bias", f"{side}/{part}/bias"),
        )
    ),
)
