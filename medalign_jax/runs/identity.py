"""What makes a run the run that it is: which keys of its config, which recordings.

A run may be started again in its workdir with whatever does not change what it has trained. So a
config is compared key by key, by `RULES`, and the recordings are compared themselves: their sound,
their splits and their reports, wherever the files lie now and however the config came to them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from medalign_jax.core.files import encoded

ABSENT = "(absent)"

FIXED = "fixed"  # decides what is trained
FREE = "free"  # what comes after training, how fast it goes, what is shown
LONGER = "longer"  # may grow
ARM = "arm"  # decides one arm, which has a folder of its own
SUPERVISED = "supervised"  # decides the supervised reference, which has a folder of its own

# Dotted keys (regexes of all of it), first match wins; `FIXED` where none does.
RULES = (
    (r"evaluate\..*", FREE),  # what it asks of splits and folds is compared with the recordings
    (r"mesh\..*", FREE),
    (
        r"train\.(log_every|accumulate|tensorboard|wandb)",
        FREE,
    ),  # parts of a batch give what the whole gives
    (r"train\.(steps|epochs)", LONGER),
    (r"data\.(manifest|questions|audio|iemocap|emodb)", FREE),  # what lies there is compared
    (r"data\.(mmau|mmau_audio)", FREE),  # only measured on
    (r"data\.(targets|max_bad_fraction|decode|copies|workers)", FREE),
    (r"teacher\.(others|cache)", FREE),  # others are arms; a cache knows whose it is
    (r"seeds", FREE),  # each has a folder of its own
    (r"arms\..*", ARM),
    (r"supervised\.enabled", FREE),
    (r"supervised\..*", SUPERVISED),
)
# Blocks without a fixed set of keys: one that is not there is not there by default.
OPEN = re.compile(r"(arms|loss\.options|encoder\.(overrides|front_end)|[^.]+\.changes)\..*")


@dataclasses.dataclass(frozen=True)
class Difference:
    """A key whose value differs from that in the run that is there.

    Attributes:
      key: dotted.
      before, now: values, `ABSENT` where there is none.
      kind: one of the kinds above.
    """

    key: str
    before: Any
    now: Any
    kind: str

    @property
    def arm(self) -> str:
        """Of a key of kind `ARM`: the arm's name."""
        return self.key.split(".", 2)[1]

    @property
    def grows(self) -> bool:
        """Whether the value is a larger number now."""
        return all(isinstance(v, int | float) for v in (self.before, self.now)) and (
            self.now > self.before
        )

    def __str__(self) -> str:
        return f"{self.key}: {self.before} there, {self.now} now"


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any] | None
) -> list[Difference]:
    """Keys that differ between two configs, as JSON trees.

    A key that the config there does not have was added by a newer version: it counts as having its
    default there.

    Args:
      before: config of the run that is there.
      now: as asked for.
      defaults: the same before anything was changed on the command line; None where that is not
        known, which takes values of new keys for their defaults.
    """
    there, asked = flat(before), flat(now)
    usual = asked if defaults is None else flat(defaults)
    found = []
    for key in sorted(there.keys() | asked.keys()):
        old, new = there.get(key, ABSENT), asked.get(key, ABSENT)
        if key not in there and not OPEN.fullmatch(key):
            old = usual.get(key, ABSENT)
        if old != new:
            found.append(Difference(key, old, new, kind_of(key)))
    return found


def kind_of(key: str) -> str:
    """By `RULES`."""
    return next((kind for rule, kind in RULES if re.fullmatch(rule, key)), FIXED)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> leaf of a JSON tree; an empty object has no leaf, but an arm without changes is
    one."""
    if not isinstance(tree, Mapping) or (not tree and re.fullmatch(r"arms\.[^.]+", prefix)):
        return {prefix: tree}
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


# -------------------------------------------------------------------------- recordings

Recording = dict[str, str]  # "name", "sound", and what else decides what is trained


def recording(name: str, sound: str, **more: str | Sequence[str]) -> Recording:
    """One recording (or question) as a run is known by it.

    Args:
      name: for people, and to find it again where its sound has changed.
      sound: equal for what sounds equal.
      **more: whatever else decides what is trained; several texts become a digest.
    """
    more = {key: v if isinstance(v, str) else digest(list(v)) for key, v in more.items()}
    return {"name": name, "sound": sound, **more}


def digest(value: Any) -> str:
    """Of something that JSON can hold: 16 hex digits."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(encoded(text), digest_size=8).hexdigest()


def compare_recordings(before: Sequence[Recording], now: Sequence[Recording]) -> list[str]:
    """What is not as it was, in sentences: how many, and the first of each kind; [] if nothing.

    Recordings are found by their name, else by their sound: files may move. Columns that one side
    does not have are not compared.
    """
    new, changed, order = [], [], []
    left = dict(enumerate(before))
    for (row, record), found in zip(enumerate(now), _matches(before, now), strict=True):
        if found is None:
            new.append(f"'{record['name']}'")
            continue
        order.append(found)
        if difference := _changes(left.pop(found), record):
            changed.append(f"row {row + 1} ('{record['name']}'): {difference}")
    gone = [f"'{record['name']}'" for record in left.values()]
    sentences = [
        f"{len(found)} of {of} {what}, the first: {found[0]}"
        for found, of, what in (
            (gone, len(before), "are not there any more"),
            (new, len(now), "are new"),
            (changed, len(now), "are changed"),
        )
        if found
    ]
    if not sentences and order != sorted(order):
        row = next(i for i, (a, b) in enumerate(zip(order, sorted(order), strict=True)) if a != b)
        sentences.append(f"they are in another order from row {row + 1} ('{now[row]['name']}') on")
    return sentences


def _matches(before: Sequence[Recording], now: Sequence[Recording]) -> list[int | None]:
    """For each record the row that it had before; None for one that was not there."""
    names = {record["name"]: row for row, record in enumerate(before)}
    found = [names.pop(record["name"], None) for record in now]
    left = set(range(len(before))) - set(found)
    sounds: dict[str, list[int]] = {}
    for row in sorted(left, reverse=True):
        sounds.setdefault(before[row]["sound"], []).append(row)
    for row, record in enumerate(now):
        if found[row] is None and sounds.get(record["sound"]):
            found[row] = sounds[record["sound"]].pop()
    return found


def _changes(before: Recording, now: Recording) -> str:
    """What differs in one recording, in words."""
    words: dict[str, Callable[[str, str], str]] = {
        "sound": lambda old, new: "another sound",
        "reports": lambda old, new: "other reports",
        "text": lambda old, new: "another text",
    }
    return ", ".join(
        words.get(key, lambda old, new, key=key: f"{key} {old} there, {new} now")(old, now[key])
        for key, old in before.items()
        if key != "name" and key in now and now[key] != old
    )
