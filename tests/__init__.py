"""The tests: a package of its own, so that spawned processes find it before any other `tests`."""
