"""How much memory this process may still take, on the machine and in the control group that it runs in."""

from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_GROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # the first version of control groups writes a number near 2^63 for no limit


def available_memory() -> int | None:
    """Bytes; pages that only cache files count as available. None where the system does not say (no Linux)."""
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
        of_machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    return max(0, min([of_machine, *_of_groups()]))


def _of_groups() -> Iterator[int]:
    """What is left of the limit of each group that has one."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "", "")
        if number == "0" and not controllers:
            root, names, prefix = _GROUPS, ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):
            root, names, prefix = _GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        else:
            continue
        place = root / path.strip("/")
        for folder in (place, *place.parents):  # in a container the path may be the host's: then the root has it
            if folder.is_relative_to(root) and (left := _left(folder, *names, prefix)) is not None:
                yield left


def _left(folder: Path, limit: str, used: str, prefix: str) -> int | None:
    try:
        most, taken = int((folder / limit).read_text()), int((folder / used).read_text())  # "max" is no number
        facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = sum(int(facts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    except (OSError, ValueError):
        return None
    return None if most >= _UNLIMITED else most - taken + cached
