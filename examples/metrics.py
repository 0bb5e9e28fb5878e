"""Scores of masks, image by image."""
