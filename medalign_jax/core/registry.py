"""Named parts: this package's own, and those that other packages bring along.

A package makes a part known by an entry point in its pyproject.toml, and needs no line here:

    [project.entry-points."medalign_jax.encoders"]
    my_encoder = "my_package.my_encoder:ENTRY"
"""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from medalign_jax.core.errors import UserError

Part = TypeVar("Part")


class Registry(Mapping[str, Part], Generic[Part]):
    """name -> part; what another package brings is imported when it is asked for by name."""

    def __init__(self, group: str, own: Mapping[str, Part], kind: Any = object):
        """Args:
        group: of the entry points.
        own: this package's parts; they take precedence over others of the same name.
        kind: class, or classes, that a part has to be of.
        """
        self._group, self._own, self._kind = group, dict(own), kind

    @functools.cached_property
    def _others(self) -> dict[str, importlib.metadata.EntryPoint]:
        points = importlib.metadata.entry_points(group=self._group)
        found: dict[str, importlib.metadata.EntryPoint] = {}
        for point in sorted(points, key=lambda p: (p.name, p.value)):
            if point.name in self._own or point.name in found:
                warnings.warn(
                    f"{self._whose(point)} calls a part of {self._group} {point.name!r}, and there "
                    "is one of that name already, which is taken: give it another name",
                    stacklevel=2,
                )
            else:
                found[point.name] = point
        return found

    def loaded(self) -> Iterator[tuple[str, Part]]:
        """(name, part) of all that load; for the others there is a warning."""
        for name in self:
            try:
                yield name, self[name]
            except UserError as error:
                warnings.warn(str(error), stacklevel=2)

    def __getitem__(self, name: str) -> Part:
        """Raises KeyError for an unknown name, `UserError` for a part that does not load."""
        if name in self._own:
            return self._own[name]
        point = self._others[name]
        try:
            part = point.load()
        except Exception as error:  # another package's code: it may raise anything
            raise UserError(
                f"{name!r} of {self._whose(point)} does not load ({point.value}): "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(part, self._kind):
            raise UserError(
                f"{name!r} of {self._whose(point)} ({point.value}) is a {type(part).__name__}, "
                f"which is not part of {self._group}"
            )
        return part

    @staticmethod
    def _whose(point: importlib.metadata.EntryPoint) -> str:
        return "a package" if point.dist is None else f"the package {point.dist.name}"

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._others

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self._others

    def __len__(self) -> int:
        return len(self._own) + len(self._others)
