"""Parts of a benchmark's report: sections of tables and charts, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

FIGURES = "figures"  # folder of the figures' data


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    small: str = ""  # beneath it
    state: str = ""  # "good", "bad"


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells in rows; the first column is text, numbers follow."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    title: str = ""
    note: str = ""
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure and its data."""

    name: str
    title: str
    caption: str
    draw: Callable[[], Any]  # a Figure of matplotlib
    columns: Sequence[str]
    data: Sequence[Sequence[Any]]
    wide: bool = False
    key: bool = True  # whether lines and markers are the detectors'

    @property
    def file(self) -> str:
        """Path of the data in the report's folder."""
        return f"{FIGURES}/{self.name}.csv"


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what is below it."""

    title: str
    parts: Sequence[Table | Chart]
    text: str = ""
