"""Labelled music, for training and benchmarks: manifests, decoded audio, augmentation, teachers."""
