"""Who runs the reverse chain: the contract, the registry, and the four that ship."""
