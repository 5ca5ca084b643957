"""Which tensor goes where: a table held against the names of a source and of a model.

Every difference is noted, none is raised here, so that a user reads all of them at once.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from medalign_jax.weights.lazy import WeightError
from medalign_jax.weights.table import (
    Ignore,
    Rule,
    Shape,
    Table,
    fill,
    path_pattern,
    upstream_pattern,
)

_KINDS = ("table", "ambiguous", "missing", "unused", "shape", "dtype", "content")


@dataclasses.dataclass(frozen=True)
class Slot:
    """A parameter and the tensors that fill it: one, or one per layer of axis 0 if stacked.

    `rivals` are alternatives that are there too; what they are is said as ambiguous, not unused.
    """

    path: str
    rule: Rule
    names: tuple[str, ...]
    rivals: tuple[str, ...] = ()


@dataclasses.dataclass
class Problems:
    """Differences found so far, by kind."""

    found: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def add(self, kind: str, text: str) -> None:
        """Notes one difference of a kind in `_KINDS`."""
        self.found.append((kind, text))

    def raise_if_any(self, headline: str) -> None:
        """Raises one WeightError that lists everything noted."""
        if not self.found:
            return
        ordered = sorted(self.found, key=lambda problem: _KINDS.index(problem[0]))
        lines = [f"  {kind}: {text}" for kind, text in ordered]
        counts = ", ".join(
            f"{sum(kind == each for each, _ in ordered)} {kind}"
            for kind in _KINDS
            if any(kind == each for each, _ in ordered)
        )
        raise WeightError("\n".join([f"{headline} ({counts}):", *lines]))


@dataclasses.dataclass(frozen=True)
class Match:
    """What `match` found.

    Attributes:
      slots: by parameter path.
      prefix: what `{prefix}` stands for.
      copies: (ignored tensor, tensor that it has to equal).
    """

    slots: dict[str, Slot]
    prefix: str
    copies: list[tuple[str, str]]


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """A parameter tree as a dict from path (keys joined by `/`) to leaf, and its structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(_key(part) for part in path): leaf for path, leaf in leaves}, structure


def _key(part: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)


def match(
    table: Table, names: Iterable[str], shapes: Mapping[str, Shape], problems: Problems
) -> Match:
    """Gives every parameter its tensors, every tensor its use; notes what does not work out.

    Args:
      table: the architecture's.
      names: upstream names that are there.
      shapes: shape of each parameter, by path.
      problems: differences are added to it.
    """
    names = set(names)
    prefix = _prefix(table, names, problems)
    slots = _slots(table, shapes, prefix, names, problems)
    uses: dict[str, list[str]] = {}
    for slot in slots.values():
        for name in slot.names:
            uses.setdefault(name, []).append(f"parameter {slot.path}")
        for name in slot.rivals:
            uses.setdefault(name, [])
    copies = []
    for ignore in table.ignores:
        pattern = upstream_pattern(ignore.pattern, prefix)
        for name in sorted(names):
            if pattern.fullmatch(name):
                uses.setdefault(name, []).append(f"ignored: {ignore.reason}")
                copies += [(name, other) for other in _equal_to(ignore, prefix)]
    for name, claims in sorted(uses.items()):
        if name in names and len(set(claims)) > 1 and any(c.startswith("param") for c in claims):
            problems.add("ambiguous", f"tensor {name} is claimed by {' and by '.join(claims)}")
    _note_missing_and_unused(table, slots, uses, names, prefix, problems)
    return Match(slots, prefix, copies)


def _equal_to(ignore: Ignore, prefix: str) -> list[str]:
    return [] if ignore.equal_to is None else [fill(ignore.equal_to, prefix)]


def _prefix(table: Table, names: set[str], problems: Problems) -> str:
    """The one prefix under which rules find tensors; the first one if none does."""
    templates = [name for rule in table.rules for name in rule.names if "{prefix}" in name]
    found = [
        prefix
        for prefix in table.prefixes
        if any(
            pattern.fullmatch(name)
            for pattern in (upstream_pattern(template, prefix) for template in templates)
            for name in names
        )
    ]
    if len(found) > 1:
        listed = " and ".join(repr(prefix) for prefix in found)
        problems.add("ambiguous", f"tensors under several prefixes of the table: {listed}")
    return (found or list(table.prefixes))[0]


def _slots(
    table: Table, shapes: Mapping[str, Shape], prefix: str, names: set[str], problems: Problems
) -> dict[str, Slot]:
    patterns = [(rule, path_pattern(rule.path)) for rule in table.rules]
    slots = {}
    for path, shape in shapes.items():
        fitting = []
        for rule, pattern in patterns:
            hit = pattern.fullmatch(path)
            layer = int(hit["i"]) if hit and "i" in pattern.groupindex else None
            if hit and (layer is None or rule.layers is None or layer in rule.layers):
                fitting.append((rule, layer))
        if not fitting:
            close = _nearest([path], [rule.path for rule in table.rules])
            problems.add("table", f"no rule fills parameter {path} {list(shape)}{close[path]}")
        elif len(fitting) > 1:
            rules = " and ".join(repr(rule.upstream) for rule, _ in fitting)
            problems.add("ambiguous", f"parameter {path} is filled by the rules for {rules}")
        else:
            rule, layer = fitting[0]
            slots[path] = _slot(path, shape, rule, layer, prefix, names, problems)
    return slots


def _slot(
    path: str,
    shape: Shape,
    rule: Rule,
    layer: int | None,
    prefix: str,
    names: set[str],
    problems: Problems,
) -> Slot:
    layers: tuple[int | None, ...] = (layer,)
    if rule.stacked:
        depth = shape[0] if shape else 0
        layers = rule.layers if rule.layers is not None else tuple(range(depth))
        if not shape or len(layers) != depth:
            text = f"parameter {path} {list(shape)} must stack {len(layers)} layers on axis 0"
            problems.add("shape", text)
    chosen, rivals = [], []
    for each in layers:
        alternatives = [fill(name, prefix, each) for name in rule.names]
        there = [name for name in alternatives if name in names]
        if len(there) > 1:
            listed = " and ".join(there)
            problems.add("ambiguous", f"parameter {path}: alternatives are both there: {listed}")
        chosen.append((there or alternatives)[0])
        rivals += there[1:]
    return Slot(path, rule, tuple(chosen), tuple(rivals))


def _note_missing_and_unused(
    table: Table,
    slots: Mapping[str, Slot],
    uses: Mapping[str, list[str]],
    names: set[str],
    prefix: str,
    problems: Problems,
) -> None:
    missing = {
        name: slot.path for slot in slots.values() for name in slot.names if name not in names
    }
    unused = sorted(names - set(uses))
    hints = _nearest(missing, unused or sorted(names))
    for name, path in missing.items():
        problems.add("missing", f"{name} for parameter {path}{hints[name]}")
    hints = _nearest(unused, list(missing) or list(uses))
    rules = [
        (rule, upstream_pattern(template, prefix))
        for rule in table.rules
        for template in rule.names
    ]
    for name in unused:
        path = next((rule.path for rule, pattern in rules if pattern.fullmatch(name)), None)
        reason = hints[name] if path is None else f"; the model has no place for it at {path}"
        problems.add("unused", f"{name}{reason}")


def _nearest(wanted: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """For each name a hint at the most similar known one, or an empty string.

    Names that differ in their numbers only are compared once: a wrong checkpoint may have
    thousands.
    """
    by_template: dict[str, list[str]] = {}
    for name in known:
        by_template.setdefault(re.sub(r"\d+", "0", name), []).append(name)
    cache: dict[str, list[str]] = {}
    hints = {}
    for name in wanted:
        template = re.sub(r"\d+", "0", name)
        if template not in cache:
            cache[template] = difflib.get_close_matches(template, by_template, n=1)
        candidates = [each for close in cache[template] for each in by_template[close]]
        numbers = re.findall(r"\d+", name)
        same = [each for each in candidates if re.findall(r"\d+", each) == numbers]
        best = (same or candidates or [""])[0]
        hints[name] = f" (nearest: {best})" if best else ""
    return hints
