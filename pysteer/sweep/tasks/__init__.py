"""Kinds of work that can be swept."""
