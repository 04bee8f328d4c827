"""Texts of others on a terminal and in what is kept: they style nothing, command nothing, and no log holds weights."""

import io
import json
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from rich.console import Console
from rich.errors import MarkupError

from kedit_jax import solve
from kedit_jax.checkpoint import newest_version, read_manifest, save_session
from kedit_jax.cli import app, history, show
from kedit_jax.cli.measured import Measured, ability_table
from kedit_jax.cli.text import escape
from kedit_jax.cli.verify import checks_table
from kedit_jax.editing.session import EditSession, Event
from kedit_jax.errors import KeditError, NonFiniteError
from kedit_jax.evaluation import AbilityScore, Completion
from kedit_jax.verification import verify_session

HOSTILE = "[/] [bold]x[/bold] [link=http://a]y \\[z] \x1b]0;title\x07 \x1b[31m \x9b31m \r gone"
SHOWN = HOSTILE.replace("\x1b", "\ufffd").replace("\x07", "\ufffd").replace("\x9b", "\ufffd").replace("\r", "\ufffd")


def printed(*what: object) -> str:
    file = io.StringIO()
    console = Console(file=file, width=2000, force_terminal=True, color_system="truecolor", highlight=False)
    for one in what:
        console.print(one)
    return file.getvalue()


def test_a_text_is_printed_for_what_it_says() -> None:
    assert printed(escape(HOSTILE)) == f"{SHOWN}\n"
    assert printed(f"[bold]{escape(HOSTILE)}[/] {escape('[/]')}") == f"\x1b[1m{SHOWN}\x1b[0m [/]\n"
    assert escape("two\nlines\tand a tab") == "two\nlines\tand a tab"


def test_negative_control_raw_texts_end_the_command_or_reach_the_terminal() -> None:
    with pytest.raises(MarkupError):
        printed(HOSTILE)
    assert "\x1b]0;title" in printed("\x1b]0;title")


def test_everything_a_session_says_is_shown_as_text() -> None:
    event = Event(HOSTILE, (HOSTILE,), (HOSTILE,), (HOSTILE,), texts=(HOSTILE,), reason=HOSTILE)
    said = printed(*show.log([event], [HOSTILE.replace("T", "t")], {}))
    assert said.count(SHOWN) == 7, "kind, time, reason, and of each list its name, with what it says where that is known"
    assert not re.search("\x1b[^[]|\x9b|\x07|\r", said)
    table = show.completions([Completion(HOSTILE, HOSTILE, HOSTILE)], [HOSTILE], "title")
    assert printed(table).count(SHOWN) == 4
    score = AbilityScore(1.0, 2.0, 25.0, 8)
    rows = {"unedited": mock.Mock(Measured, ability={HOSTILE: score})}
    assert SHOWN in printed(ability_table(rows))


def test_errors_about_a_text_are_shown_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(app, "app", side_effect=KeditError(f"no file {HOSTILE}")), pytest.raises(SystemExit):
        app.main()
    assert SHOWN.split("\ufffd")[0] in capsys.readouterr().err


# --- weights stay where they are --------------------------------------------------------------------------------------

MANY = re.compile(r"(?:-?\d+\.\d+(?:e[-+]?\d+)?[\s,;\[\]]+){4}")
"""Four numbers with a point, one after another: no record has them but arrays."""


def test_what_is_logged_and_told_holds_no_weights(history_of_two: EditSession, tmp_path: Path) -> None:
    save_session(history_of_two, tmp_path)
    file = io.StringIO()
    with mock.patch.object(history, "console", Console(file=file, width=200)):
        history.log(tmp_path, every=True)
    told = [file.getvalue(), printed(checks_table(verify_session(history_of_two))), json.dumps(read_manifest(tmp_path))]
    version = newest_version(tmp_path)
    told += [path.read_text() for path in version.iterdir() if path.is_file()]
    told += [repr(history_of_two.events), show.summary(history_of_two)]
    assert all(len(text) > 20 for text in told if "commit" not in text and text)
    assert not [text for text in told if MANY.search(text)]


def test_negative_control_arrays_would_be_seen(history_of_two: EditSession) -> None:
    update = next(iter(history_of_two.layers.values())).update
    for text in (str(update), json.dumps(update.tolist()), repr(update)):
        assert MANY.search(text)


def test_errors_about_numbers_count_them() -> None:
    moment = np.full((3, 3), np.nan)
    moment[0] = 0.1234567
    with pytest.raises(NonFiniteError, match="6 entries") as caught:
        solve.EDITORS["memit"](moment)
    assert "0.1234" not in str(caught.value)


@pytest.fixture(scope="module")
def history_of_two(history: list[EditSession]) -> EditSession:
    return history[2]
