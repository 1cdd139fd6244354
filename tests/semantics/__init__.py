"""End-to-end semantics of a mounted union, proved on the kernel as well as on our own mount."""
