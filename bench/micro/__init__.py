"""Costs of single calls, without a mount."""
