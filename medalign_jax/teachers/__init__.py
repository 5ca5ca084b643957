"""Frozen language models: `teacher` turns reports into vectors, `whitening` evens these out.

Two caches: `embedding_cache` of the reports' vectors (AcuLa), `state_cache` of the hidden states
and logits of a text teacher (distillation, whose teacher in the step is `methods.text_teacher`).
"""

from medalign_jax.teachers.embedding_cache import CacheError, EmbeddingCache
from medalign_jax.teachers.reading import OverlongWarning, Reading, TeacherError
from medalign_jax.teachers.teacher import Teacher, load_teacher

__all__ = [
    "CacheError",
    "EmbeddingCache",
    "OverlongWarning",
    "Reading",
    "Teacher",
    "TeacherError",
    "load_teacher",
]
