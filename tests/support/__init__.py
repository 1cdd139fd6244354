"""What the tests share: capability probes, trees as values, faults."""
