"""Matching of unpaired data: retrieval, the self-supervised matcher, and data sets of matches."""
