"""The algorithms: one file each, what they share in `base`, and in `registry` which there are."""
