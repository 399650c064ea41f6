"""A progress bar on a terminal, and readable lines where the output is a file or a pipe."""

from __future__ import annotations

import sys
import time
from typing import IO

from tqdm import tqdm

EVERY = 20.0  # seconds between lines


class Progress:
    """Counts weighted work. `total` is the cost of everything still to do, in any unit."""

    def __init__(self, total: float, stream: IO[str] | None = None) -> None:
        self.total, self.done, self.now = max(total, 1e-9), 0.0, 0.0
        self.start = self.last = time.monotonic()
        self.stream = sys.stderr if stream is None else stream
        self.name = ""
        layout = "{percentage:3.0f}%|{bar:24}| {desc}"
        self.bar = (
            tqdm(total=1.0, bar_format=layout, file=self.stream, leave=False, mininterval=0.2)
            if self.stream.isatty()
            else None
        )

    def begin(self, name: str) -> None:
        """A new point; `name` says which."""
        self.name, self.now = name, 0.0
        if self.bar is None:
            self._line("starts")
        else:
            self._draw("")

    def at(self, fraction: float, cost: float, text: str) -> None:
        """The point is done to `fraction` of its `cost`."""
        self.now = min(max(fraction, 0.0), 1.0) * cost
        if self.bar is not None:
            self._draw(text)
        elif time.monotonic() - self.last >= EVERY:
            self._line(text)

    def say(self, text: str) -> None:
        """A line of its own, whatever the bar shows."""
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def end(self, cost: float) -> None:
        self.done, self.now = self.done + cost, 0.0

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    @property
    def fraction(self) -> float:
        return min((self.done + self.now) / self.total, 1.0)

    def left(self) -> str:
        """Time left at the average pace so far; nothing before there is a pace."""
        spent, fraction = time.monotonic() - self.start, self.fraction
        if fraction < 0.005 or spent < 1.0:
            return ""
        return f", {duration(spent * (1.0 - fraction) / fraction)} left"

    def _draw(self, text: str) -> None:
        assert self.bar is not None
        self.bar.n = self.fraction
        self.bar.set_description_str(f"{self.name}{': ' + text if text else ''}{self.left()}", refresh=False)
        self.bar.update(0)
        if time.monotonic() - self.last >= 0.2:
            self.last = time.monotonic()
            self.bar.refresh()

    def _line(self, text: str) -> None:
        self.last = time.monotonic()
        print(f"{self.fraction:4.0%} {self.name}: {text}{self.left()}", file=self.stream, flush=True)


def duration(seconds: float) -> str:
    """``45 s``, ``3 min``, ``1 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
