"""Templates of pages: jinja2 with everything escaped that a template does not call safe."""

from __future__ import annotations

import functools

import jinja2

from medalign_jax.page import figures, media


@functools.cache
def environment(*packages: str) -> jinja2.Environment:
    """Templates of the folders `templates` of packages, and of this one.

    Args:
      *packages: names of packages whose templates come first.
    """
    found = [jinja2.PackageLoader(name) for name in (*packages, "medalign_jax.page")]
    made = jinja2.Environment(
        loader=jinja2.ChoiceLoader(found),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {
        "WIDTH": media.WIDTH,
        "audio_uri": media.audio_uri,
        "columns": lambda head: [head[0], *(f"#{name}" for name in head[1:])],
        "line_chart": figures.line_chart,
        "scatter_maps": figures.scatter_maps,
        "scores_chart": figures.scores_chart,
        "spectrogram_uri": media.spectrogram_uri,
        "waveform_path": media.waveform_path,
    }
    return made
