"""Short runs of the stress tools; the long ones are ``./dev stress``."""
