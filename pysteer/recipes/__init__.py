"""Experiments: each a configuration and a function, run by `pysteer run NAME`."""

from pysteer.recipes.frame import (
    Recipe,
    Run,
    Stage,
    Summary,
    execute,
    find_recipe,
    recipe,
    recipe_modules,
    recipe_notes,
)

__all__ = ["Recipe", "Run", "Stage", "Summary", "execute", "find_recipe", "recipe", "recipe_modules", "recipe_notes"]
