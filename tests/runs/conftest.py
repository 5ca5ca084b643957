"""Runs of this folder compile their training steps, most of their time, as `tests.quick` says."""

import jax
import pytest

from tests.quick import OPTIONS


@pytest.fixture(scope="module", autouse=True)
def quick_steps():
    compiled = jax.stages.Lowered.compile

    def compile_quickly(self, compiler_options=None, **more):
        quick = OPTIONS if jax.default_backend() == "cpu" else {}  # others do not know them
        return compiled(self, quick | dict(compiler_options or {}), **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", compile_quickly)
        yield
