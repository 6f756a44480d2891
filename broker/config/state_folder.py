"""Where a relay without a configuration keeps its state file."""

import os
import pwd
from collections.abc import Mapping
from pathlib import Path

NAME = "embed-token-broker"
"""Of the folder."""

FILE = "state.db"
"""Of the file in it."""


def default_path(environ: Mapping[str, str]) -> Path:
    """Return the path of the file.

    In the folder that systemd made for the service (`STATE_DIRECTORY`, the first of them), else in
    one of the user's (XDG Base Directory Specification 0.8: `XDG_STATE_HOME`, else
    `~/.local/state`); a relative path counts as not set, as that says.
    """
    given = environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if given.startswith("/"):
        return Path(given) / FILE
    state_home = environ.get("XDG_STATE_HOME", "")
    if not state_home.startswith("/"):
        home = environ.get("HOME", "")
        if not home.startswith("/"):
            home = _home_of_user()
        state_home = f"{home}/.local/state"
    return Path(state_home) / NAME / FILE


def _home_of_user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:  # a container's user may have a number only
        return "/nonexistent"


def make_folder(path: Path, environ: Mapping[str, str]) -> None:
    """Make the folder of the file, if it is the default one; what fails is told when it is used."""
    if path == default_path(environ):
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            return


def existing_folder(path: Path, environ: Mapping[str, str]) -> Path:
    """Return the folder that has to be there: for the default file the nearest that is."""
    folder = path.parent
    if path == default_path(environ):
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
    return folder
