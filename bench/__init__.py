"""Measurements: workloads, targets and a runner."""
