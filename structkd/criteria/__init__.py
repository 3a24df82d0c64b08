"""Distillation criteria, one family a file."""
