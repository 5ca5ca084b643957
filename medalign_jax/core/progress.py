"""A progress bar with ETA in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """Shows how far a piece of work is.

    Args:
      total: number of items; None if unknown.
      what: what is being done, e.g. "align".
      unit: name of an item.
      done: items already done (after a restart).
      every_seconds: least time between two plain lines.
    """

    def __init__(
        self,
        total: int | None,
        what: str,
        unit: str = "step",
        done: int = 0,
        every_seconds: float = 10.0,
    ):
        self._total, self._what, self._unit, self._done = total, what, unit, done
        self._start, self._begun = done, None  # the first item compiles: not counted
        self._every, self._last = every_seconds, 0.0
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=what, unit=unit, initial=done) if terminal else None

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more items are done; `note` is shown beside."""
        self._done += count
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._last >= self._every or self._done == self._total:
            self._last = now
            self._line(now, note)
        if self._begun is None:
            self._start, self._begun = self._done, now

    def _line(self, now: float, note: str) -> None:
        rate = 0.0 if self._begun is None else (self._done - self._start) / (now - self._begun)
        left = "" if self._total is None else f"/{self._total}"
        eta = ""
        if self._total is not None and rate > 0 and self._done < self._total:
            eta = f", {_clock((self._total - self._done) / rate)} left"
        text = f"{self._what}: {self._unit} {self._done}{left}{eta}"
        print(text + (f" | {note}" if note else ""), flush=True)

    def say(self, text: str) -> None:
        """A line that does not break the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
