"""Whole numbers are fine in settings where a float is meant, and become one."""

import dataclasses

import pytest

from kedit_jax.editing.settings import EditSettings
from kedit_jax.editing.values import ValueSettings
from kedit_jax.errors import KeditError

FLOATS = [
    *(item.name for item in dataclasses.fields(EditSettings) if "float" in str(item.type)),
    *(f"values.{item.name}" for item in dataclasses.fields(ValueSettings)),
]


def read(name: str, value: object) -> object:
    values = name.removeprefix("values.")
    content = {"layers": [1], "values": {values: value}} if values != name else {"layers": [1], name: value}
    settings = EditSettings.from_dict(content)
    return getattr(settings.values if values != name else settings, values)


@pytest.mark.parametrize("name", [name for name in FLOATS if name != "values.steps"])
def test_a_whole_number_becomes_a_float(name: str) -> None:
    assert type(read(name, 1)) is float
    with pytest.raises(KeditError, match="which no float holds"):
        read(name, 10**400)
