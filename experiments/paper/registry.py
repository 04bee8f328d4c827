"""Every experiment by name: its config, what it runs, and its section of the report."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from experiments.paper import byproducts, conflicts, horizon, latest, main_table, necessity, shift
from experiments.paper.running import Run
from experiments.paper.stage import Stage


class Experiment(NamedTuple):
    """An experiment.

    Attributes:
        config: the dataclass that its YAML file fills.
        runs: (config, stage, seed) -> its runs; None where it reports on another's results.
    """

    config: type[Any]
    runs: Callable[[Any, Stage, int], list[Run]] | None


EXPERIMENTS: Mapping[str, Experiment] = {
    "main": Experiment(main_table.MainConfig, main_table.runs),
    "half": Experiment(main_table.MainConfig, main_table.runs),
    "necessity": Experiment(necessity.NecessityConfig, necessity.runs),
    "norms": Experiment(byproducts.ByproductConfig, None),
    "ripple": Experiment(byproducts.ByproductConfig, None),
    "drift": Experiment(byproducts.ByproductConfig, None),
    "latest": Experiment(latest.LatestConfig, latest.runs),
    "conflicts": Experiment(conflicts.ConflictsConfig, conflicts.runs),
    "horizon": Experiment(horizon.HorizonConfig, horizon.runs),
    "ability": Experiment(byproducts.ByproductConfig, None),
    "shift": Experiment(shift.ShiftConfig, shift.runs),
}
"""In the order in which they are run and reported."""
