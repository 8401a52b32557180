"""Whole-model suites: encode a batch, take one training step."""
