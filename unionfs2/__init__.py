"""Union mounts in the overlay on-disk format, through FUSE or through the kernel.

Importing this package loads neither pyfuse3 nor trio: mounting through the kernel, and working
with the core alone, must not need them.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
