"""Other people's training loops: timm's and mmpretrain's. Import the one you use by its name."""
