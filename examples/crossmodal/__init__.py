"""Cross-modal distillation, a clean teacher to a poor-modality student, on top of structkd."""
