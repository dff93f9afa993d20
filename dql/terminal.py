"""Where the command line speaks: one way to make a console, so that what it is told comes out to the letter."""

from collections.abc import Mapping, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_WIDE = 1000  # columns of a file or a pipe, where a folded table cannot be searched, nor a folded command be copied
_SHORTEST_BAR = 8  # columns; a shorter one tells nothing
_GAP = "  "


def make_console(stderr: bool = False) -> Console:
    """A console for foreign text (paths, ids, reasons, commands).

    Nothing in it is markup: rich would take `[triton]` in a command for a style, and `:cat:` in a path for a picture.
    """
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = _WIDE  # whatever COLUMNS says of a terminal somewhere
    return console


class TrainingProgress:
    """A bar with its numbers on one line and the losses below it; in a narrow terminal numbers and losses alone.

    No number is folded or cut: where the line is too short for the next one, it begins another.
    """

    def __init__(self, name: str, total: int, step: int = 0) -> None:
        self.name, self.total, self.step = name, total, step
        self.rate: float | None = None
        self.losses: Mapping[str, float] = {}

    def update(self, step: int, rate: float, losses: Mapping[str, float]) -> None:
        """`rate` in updates a second; `losses` by the names to be shown."""
        self.step, self.rate, self.losses = step, rate, losses

    def numbers(self) -> list[str]:
        """Updates done and in all, updates a second, time left; the last two once there is a rate."""
        count = f"{self.step:,}/{self.total:,}"
        if self.rate is None:
            return [count]
        return [count, f"{self.rate:.1f} updates/s", f"{_clock((self.total - self.step) / max(self.rate, 1e-9))} left"]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        losses = [f"{name} {value:.4g}" for name, value in self.losses.items()]
        numbers = _GAP.join(self.numbers())
        width = options.max_width
        bar = width - len(self.name) - len(numbers) - 2 * len(_GAP)
        if bar < _SHORTEST_BAR:
            yield from _lines([*self.numbers(), *losses], width)
            return
        line = Table.grid(padding=(0, len(_GAP), 0, 0), pad_edge=False)
        line.add_row(Text(self.name), ProgressBar(self.total, self.step, width=bar), Text(numbers))
        yield line
        yield from _lines(losses, width)


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds, and days where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days:,} d " if days else "") + f"{hour}:{minute:02}:{second:02}"


def _lines(parts: Sequence[str], width: int) -> list[Text]:
    """The parts on as few lines as hold them whole."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(_GAP) + len(part) <= width:
            lines[-1] += _GAP + part
        else:
            lines.append(part)
    return [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]
