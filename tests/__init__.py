"""A package, so that no other of this name that is installed comes before it."""
