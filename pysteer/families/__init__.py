"""Families: kinds of models, with their sites, their row order and their clock."""

from pysteer.families.base import Family, find_family, register

__all__ = ["Family", "find_family", "register"]
