"""SemBridge's setting: a rich and a poor modality, both labelled, and no sample in both."""
