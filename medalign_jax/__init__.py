"""Medical audio models that understand and reason: alignment and distillation in JAX."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_encoder", "load_language_model", "load_teacher", "losses"]


def __getattr__(name: str) -> Any:
    """The public names are imported when first used, so that `import medalign_jax` is light."""
    if name == "losses":
        import importlib

        return importlib.import_module("medalign_jax.losses")
    if name == "load_encoder":
        from medalign_jax.encoder import load_encoder

        return load_encoder
    if name == "load_teacher":
        from medalign_jax.teachers import load_teacher

        return load_teacher
    if name == "load_language_model":
        from medalign_jax.language_model import load_language_model

        return load_language_model
    raise AttributeError(f"module 'medalign_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What `dir` and completion show: the public names, imported or not yet."""
    return sorted({*globals(), *__all__})
