"""A small grammar for sentences that can be said in several ways.

A template is text with two marks::

    (a|b|)     one of the alternatives; they nest, and may be empty
    {name}     a slot, filled with another node by `fill`

Every node can `sample` one text with a random generator, or `expand` to all of its texts, lazily.
Sampling chooses evenly at each fork, so that a branch with few wordings is heard as often as its
neighbour with thousands.
"""

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache


class Node:
    """Something that can be said in one or more ways."""

    def sample(self, rng: random.Random, slots: Mapping[str, "Node"]) -> str:
        raise NotImplementedError

    def expand(self, slots: Mapping[str, "Node"]) -> Iterator[str]:
        raise NotImplementedError


@dataclass(frozen=True)
class Literal(Node):
    """A text as it stands."""

    text: str

    def sample(self, rng, slots):
        return self.text

    def expand(self, slots):
        yield self.text


@dataclass(frozen=True)
class Slot(Node):
    """What another part of the report puts here, by name."""

    name: str

    def sample(self, rng, slots):
        return slots[self.name].sample(rng, slots)

    def expand(self, slots):
        return slots[self.name].expand(slots)


@dataclass(frozen=True)
class Chain(Node):
    """Parts one behind the other."""

    parts: tuple[Node, ...]

    def sample(self, rng, slots):
        return "".join(part.sample(rng, slots) for part in self.parts)

    def expand(self, slots):
        # itertools.product would draw every part to its end before the first text comes out.
        if not self.parts:
            yield ""
            return
        rest = Chain(self.parts[1:])
        for head in self.parts[0].expand(slots):
            for tail in rest.expand(slots):
                yield head + tail


@dataclass(frozen=True)
class Choice(Node):
    """One of several wordings."""

    options: tuple[Node, ...]

    def sample(self, rng, slots):
        return rng.choice(self.options).sample(rng, slots)

    def expand(self, slots):
        return itertools.chain.from_iterable(option.expand(slots) for option in self.options)


@dataclass(frozen=True)
class Shuffle(Node):
    """The items in any order, with `between` between them and `last` before the last one."""

    items: tuple[Node, ...]
    between: str = ", "
    last: str = " and "

    def sample(self, rng, slots):
        return self._ordered(rng.sample(self.items, len(self.items))).sample(rng, slots)

    def expand(self, slots):
        for order in itertools.permutations(self.items):
            yield from self._ordered(order).expand(slots)

    def _ordered(self, items: Sequence[Node]) -> Chain:
        parts: list[Node] = []
        for position, item in enumerate(items):
            if position:
                final = position == len(items) - 1
                parts.append(Literal(self.last if final else self.between))
            parts.append(item)
        return Chain(tuple(parts))


@dataclass(frozen=True)
class Filled(Node):
    """A node with its own slots; those of the surrounding text are not seen inside."""

    node: Node
    slots: Mapping[str, Node] = field(hash=False)

    def sample(self, rng, slots):
        return self.node.sample(rng, self.slots)

    def expand(self, slots):
        return self.node.expand(self.slots)


def fill(templates: str | Sequence[str], **slots: Node | str) -> Node:
    """A node for one template, or for the choice between several, with its slots filled.

    Text given for a slot is taken literally: a mark of the grammar in it means nothing.
    """
    nodes = {key: Literal(s) if isinstance(s, str) else s for key, s in slots.items()}
    options = (templates,) if isinstance(templates, str) else tuple(templates)
    trees = tuple(_parse(option) for option in options)
    return Filled(trees[0] if len(trees) == 1 else Choice(trees), nodes)


@cache
def _parse(template: str) -> Node:
    tokens = re.findall(r"[(|)]|\{\w+\}|[^(|){}]+", template)
    if "".join(tokens) != template:
        raise ValueError(f"template with a stray brace: {template!r}")
    node, rest = _alternatives(tokens)
    if rest:
        raise ValueError(f"template with a stray bracket: {template!r}")
    return node


def _alternatives(tokens: list[str]) -> tuple[Node, list[str]]:
    """Parse up to the closing bracket of this level; also returns the tokens from there on."""
    options: list[list[Node]] = [[]]
    while tokens and tokens[0] != ")":
        token, tokens = tokens[0], tokens[1:]
        if token == "|":
            options.append([])
        elif token == "(":
            node, tokens = _alternatives(tokens)
            if not tokens:
                raise ValueError("template with a bracket that is never closed")
            options[-1].append(node)
            tokens = tokens[1:]
        elif token.startswith("{"):
            options[-1].append(Slot(token[1:-1]))
        else:
            options[-1].append(Literal(token))
    chains = tuple(Chain(tuple(parts)) for parts in options)
    return (chains[0] if len(chains) == 1 else Choice(chains)), tokens


def distinct(node: Node, count: int, seed: int, finish=str.strip) -> tuple[str, ...]:
    """Up to `count` different texts of `node`, the same ones for the same seed.

    Args:
      node: what is to be said.
      count: how many texts are wanted; fewer come back only if fewer exist.
      seed: seed of the choice.
      finish: applied to each text before they are compared.
    """
    rng = random.Random(seed)
    texts: dict[str, None] = {}
    for _ in range(4 * count + 16):
        if len(texts) >= count:
            break
        texts[finish(node.sample(rng, {}))] = None
    if len(texts) < count:  # few wordings exist: go through them all
        everything = node.expand({})
        while len(texts) < count and (text := next(everything, None)) is not None:
            texts[finish(text)] = None
    return tuple(texts)[:count]
