"""Experiments that are columns of the main table's lines: norms [f], ripple [j], drift [i], ability [c]."""

from dataclasses import dataclass, field

from experiments.paper.config import check
from experiments.paper.measures import check_columns


@dataclass(frozen=True)
class ByproductConfig:
    """Which results are reported on, and which of their columns."""

    source: str = field(metadata={"key": "from"})
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check((self.source == "main", f"from is {self.source!r}; the lines of main are all that hold these columns"))
        check_columns(self.columns)
