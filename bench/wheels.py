"""Fetches what a machine without a network lacks for `bench/gpu.sh`: python bench/wheels.py --have LIST [--python 3.12]

LIST holds the names of the packages that are there, one a line, as `pip list --format=freeze` prints them; torch, numpy
and triton with their CUDA libraries should be among them. Wheels for Linux on x86-64 go to bench/wheels/, from where
`bench/gpu.sh` installs them without asking an index. They are replaced as a whole.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "bench" / "wheels"
EXTRA = "test"
GLIBC = range(39, 16, -1)  # manylinux_2_N; pip takes each by name


def requirements(extra: str) -> list[str]:
    """Those of the package with an extra, its own extras resolved."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found, waiting = list(project["dependencies"]), [extra]
    while waiting:
        for requirement in project["optional-dependencies"][waiting.pop()]:
            own = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
            if own:
                waiting += own[1].split(",")
            else:
                found.append(requirement)
    return found


def name_of(requirement: str) -> str:
    """Normalised, without extras and versions."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""


def fetch(have: set[str], python: str) -> list[Path]:
    """Downloads what is not in `have`.

    Raises:
        subprocess.CalledProcessError: pip could not.
    """
    platforms = [*(f"manylinux_2_{n}_x86_64" for n in GLIBC), "manylinux2014_x86_64", "manylinux1_x86_64"]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    target += [word for platform in platforms for word in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wanted = [requirement for requirement in requirements(EXTRA) if name_of(requirement) not in have]
    resolve = ["install", "--dry-run", "--ignore-installed", "--report", "-", "--target", str(PLACE), *target, *wanted]
    report = json.loads(subprocess.run([*pip, *resolve], check=True, stdout=subprocess.PIPE).stdout)
    chosen = [item["metadata"] for item in report["install"] if name_of(item["metadata"]["name"]) not in have]
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir()
    pinned = [f"{item['name']}=={item['version']}" for item in chosen]
    if pinned:
        subprocess.run([*pip, "download", "--no-deps", "-d", str(PLACE), *target, *pinned], check=True)
    return sorted(PLACE.glob("*.whl"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--have", type=Path, required=True, help="a file of names")
    parser.add_argument("--python", default="3.12", help="of the other machine (%(default)s)")
    options = parser.parse_args()
    if not options.have.is_file():
        parser.error(f"--have {options.have}: there is no such file")
    have = {name_of(line) for line in options.have.read_text().splitlines()} - {""}
    try:
        wheels = fetch(have, options.python)
    except subprocess.CalledProcessError as error:
        print(f"pip could not (exit code {error.returncode}); what it said is above", file=sys.stderr)
        return 1
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:7.1f} MiB  {wheel.name}")
    print(f"{sum(wheel.stat().st_size for wheel in wheels) / 2**20:7.1f} MiB  in {PLACE.relative_to(ROOT)}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
