"""The package's layout: the folder kernels/ is installed as dql.kernels, never as a top-level module."""

import re
from pathlib import Path

from setuptools import setup

version = re.search(
    r'^__version__ = "(.+)"$', Path(__file__).with_name("dql").joinpath("__init__.py").read_text(), re.M
)
assert version is not None, "dql/__init__.py states no __version__"

setup(
    version=version[1],
    packages=["dql", "dql.datasets", "dql.kernels", "dql.behaviours"],
    package_dir={"dql": "dql", "dql.kernels": "kernels"},
    package_data={"dql.behaviours": ["*.npz", "*.md"]},
)
