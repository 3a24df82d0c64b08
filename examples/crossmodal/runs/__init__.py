"""Runs of a job: what is stored, what is kept of a training under way, what is checked before."""
