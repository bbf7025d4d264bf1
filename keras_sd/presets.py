"""Built-in presets: names → a folder of the package, or a pinned download."""

import difflib
import pathlib

FOLDER = pathlib.Path(__file__).parent / "presets"

# name → where it comes from
PRESETS = {
    "emoji": FOLDER / "emoji",
}


def locate(preset):
    """The path of a preset, downloaded where it must be.

    Args:
        preset: a built-in name, a path, or `hf://owner/name`.

    Raises:
        ValueError: there is no preset and no path of that name.
    """
    name = str(preset)
    if name in PRESETS:
        return PRESETS[name]
    path = pathlib.Path(preset)
    if path.exists():
        return path
    close = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"No preset or path {name!r}.{hint} Presets: {', '.join(PRESETS)}; or give a path or hf://owner/name."
    )
