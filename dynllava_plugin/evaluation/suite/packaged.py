"""The suites that come with the package, found by name: `dynllava eval understanding`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from dynllava_plugin.errors import UserError


def find_suite(given: Path) -> Path:
    """Return the YAML file that `given` means: a file of the user's, or else the packaged suite of that name.

    Raises
    ------
    UserError
        For a name that no packaged suite has, with the names there are, and for a packaged suite's file that isn't
        here (the documentation's `eval_configs/NAME.yaml`, typed outside a checkout), with its name.
    """
    if given.is_file():
        return given
    packaged = {path.stem: path for path in sorted(_folder().glob("*.yaml"))}
    if given.suffix and given.stem in packaged:
        raise UserError(f"{given}: no such file; the packaged suite is `dynllava eval {given.stem}`")
    if given.suffix:
        return given
    if str(given) not in packaged:
        names = ", ".join(name for name in packaged if not name.startswith("lmms_eval_"))
        raise UserError(f"{given}: no such suite; packaged are {names}, or name a file of your own, my.yaml")
    return packaged[str(given)]


def _folder() -> Path:
    """The folder with the suites: `evaluation/suites` of a built wheel, `eval_configs` of a checkout."""
    installed = Path(str(files("dynllava_plugin.evaluation") / "suites"))
    return installed if installed.is_dir() else Path(__file__).resolve().parents[3] / "eval_configs"
