"""Archives made to break out, to lie, or to exhaust; and what must come of them."""
