"""Parts of the recipe `weightspace`."""
