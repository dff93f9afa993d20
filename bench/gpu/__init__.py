"""What `bench/gpu.sh` runs on a machine with a GPU: parts within one limit of time, into one report."""
