"""Folding affine maps into weights."""
