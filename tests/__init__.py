"""Tests of unionfs2."""
