"""Parts of the recipe `methods`: who takes part, where each is fitted, generation, choice of the strength, report."""
