"""Integrations with the training loops of timm and mmpretrain, each imported by its name."""
