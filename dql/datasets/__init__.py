"""Readers of offline-RL files: what there is on this machine, Minari, D4RL, observations as flat rows, the cache."""
