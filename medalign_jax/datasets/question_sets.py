"""Files and folders of questions by the name of their form, for `config.data.format`.

    read(path, checks=...) -> Loaded

Other packages add theirs by an entry point of the group `medalign_jax.question_sets`.
"""

from __future__ import annotations

from collections.abc import Callable

from medalign_jax.core.registry import Registry
from medalign_jax.data.questions.question import Loaded
from medalign_jax.data.questions.readers import read_cota, read_questions
from medalign_jax.datasets.emotions import read_emotions, read_iemocap

QUESTION_SETS: Registry[Callable[..., Loaded]] = Registry(
    "medalign_jax.question_sets",
    {
        "questions": read_questions,
        "cota": read_cota,
        "iemocap": read_iemocap,
        "emotions": read_emotions,
    },
    Callable,
)
