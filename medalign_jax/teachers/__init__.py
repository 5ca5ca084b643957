"""Frozen language models that turn reports into vectors, and the cache of those vectors."""

from medalign_jax.teachers.cache import CacheError, EmbeddingCache
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
