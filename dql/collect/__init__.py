"""Minari datasets made on this machine, offline, from behaviour policies that ship with the package."""

from dql.collect.make import MadeDataset, make_dataset
from dql.collect.recipes import behaviour_policy

__all__ = ["MadeDataset", "behaviour_policy", "make_dataset"]
