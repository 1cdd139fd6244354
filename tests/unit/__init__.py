"""One file per module: no mount, no privilege, milliseconds each."""
