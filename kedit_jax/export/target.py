"""Where an export may go, asked before the work of making it."""

import os
from pathlib import Path

from kedit_jax.errors import ExportError
from kedit_jax.export.delta_file import is_delta
from kedit_jax.export.staging import check_file, check_folder

FORMS = ("merged", "adapter", "delta")
"""What `export_merged`, `export_adapter` and `save_delta` write."""


def check_target(path: str | os.PathLike[str], form: str, *, overwrite: bool = False) -> Path:
    """The whole path of an export that may be written there; nothing is written yet.

    The functions that write ask this, too; planning an adapter takes minutes that are lost when they refuse.

    Args:
        form: one of `FORMS`.
        overwrite: as it will be given to the function that writes.

    Raises:
        ExportError: something stands there that may not be replaced, or there is no such form.
    """
    if form not in FORMS:
        raise ExportError(f"form is {form!r}: give one of {', '.join(FORMS)}")
    if form == "delta":
        return check_file(path, ours=is_delta, overwrite=overwrite)
    return check_folder(path, form, overwrite=overwrite)
