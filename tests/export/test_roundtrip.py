"""The recorded round trip says how it is run again."""

from __future__ import annotations

import json

import typer

from experiments.export import roundtrip


def test_the_recorded_command_can_be_run():
    """With every option that has no default, and none that the program does not know."""
    app = typer.Typer(add_completion=False)
    app.command()(roundtrip.main)
    options = typer.main.get_command(app).params
    command = json.loads((roundtrip.REPORTS / "RESULTS.json").read_text())["command"]
    given = {word for word in command.split() if word.startswith("--")}
    assert {option.opts[0] for option in options if option.required} <= given
    assert given <= {option.opts[0] for option in options}
    assert f"`{command}`" in (roundtrip.REPORTS / "RESULTS.md").read_text()
    numbers = {option.name: option.default for option in options if not option.required and option.name != "report"}
    assert roundtrip.command_line(**numbers) == command
