"""How a run shows where it is: one line on a terminal of any width, elsewhere a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from dql.config import Config

PLAIN_LINE_EVERY = 30.0  # seconds between two lines of progress where there is no terminal
SHOWN = {"actor/bc_loss": "bc", "actor/q_loss": "q_loss", "critic/loss": "critic", "critic/target_q": "target"}
BAR = 10  # columns of a bar at least, or there is none

Show = Callable[[int, float, dict[str, float]], None]  # (update, updates/s, metrics by name)


def line(width: int, step: int, total: int, rate: float, means: dict[str, float], name: str = "") -> Text:
    """As much as fits into `width` columns, in this order: count, rate, time left, losses, bar, name.

    "diffusion-ql ━━━━━━╺━━━━━━ 12,300/1,000,000  97.5/s  2:48:50  bc 0.2417  q_loss -0.8831  critic 1.203  target -41"
    """
    pieces = [f"{step:,}/{total:,}", f"{rate:.1f}/s", _duration((total - step) / rate) if rate > 0 else "-:--:--"]
    losses = [f"{short} {means[key]:.4g}" for key, short in SHOWN.items() if key in means]
    text = pieces[0]
    for piece in (*pieces[1:], *losses):
        if len(text) + 2 + len(piece) > width:
            break
        text += f"  {piece}"
    left = width - len(text) - 2
    shown = Text(no_wrap=True, overflow="crop")
    if name and left >= len(name) + 2 + BAR:
        shown.append(f"{name}  ")
        left -= len(name) + 2
    if left >= BAR:
        columns = min(left, 4 * BAR)
        done = columns * step // max(total, 1)
        shown.append("━" * done, "bar.complete")
        shown.append("━" * (columns - done), "bar.back")
        shown.append("  ")
    return shown.append(text)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(min(seconds, 1e9)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours < 100 else f"{hours // 24} days"


class _Line(ProgressColumn):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def render(self, task: Task) -> Text:
        width = self.console.width - 1  # some terminals fold what fills the last column
        return line(width, int(task.completed), int(task.total or 1), task.fields["rate"], task.fields["means"],
                    task.description)  # fmt: skip


@contextmanager
def progress(config: Config, step: int, console: Console, runs: int = 1) -> Iterator[Show]:
    """Shows a run's progress until the block ends.

    Args:
        config: the agent's, whose `num_updates` is the end.
        step: updates done.
        console: where.
        runs: how many run side by side; what is shown is of each.
    """
    name = config.algorithm if runs == 1 else f"{config.algorithm} x {runs}"
    total = config.num_updates
    if not console.is_terminal:
        spoken = time.monotonic()

        def say(step: int, rate: float, means: dict[str, float]) -> None:
            nonlocal spoken
            if time.monotonic() - spoken >= PLAIN_LINE_EVERY or step == total:
                spoken = time.monotonic()
                left = (total - step) / max(rate, 1e-9)
                losses = "  ".join(f"{short} {means[name]:.4g}" for name, short in SHOWN.items() if name in means)
                console.print(
                    f"{step:,}/{total:,}  {rate:.1f} updates/s  {left:.0f} s left  {losses}",
                    markup=False,
                    soft_wrap=True,
                )

        yield say
        return
    with Progress(_Line(console), console=console) as bar:
        task = bar.add_task(name, total=total, completed=step, rate=0.0, means={})
        yield lambda step, rate, means: bar.update(task, completed=step, rate=rate, means=means)
