"""Where the command line speaks: one way to make a console, so that what it is told comes out to the letter."""

from rich.console import Console

_WIDE = 1000  # columns of a file or a pipe, where a folded table cannot be searched, nor a folded command be copied


def make_console(stderr: bool = False) -> Console:
    """A console for foreign text (paths, ids, reasons, commands).

    Nothing in it is markup: rich would take `[triton]` in a command for a style, and `:cat:` in a path for a picture.
    """
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = _WIDE  # whatever COLUMNS says of a terminal somewhere
    return console
