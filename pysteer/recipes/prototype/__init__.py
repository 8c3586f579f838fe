"""Parts of the recipe `infinity-prototype`: configuration, prompts, generation, judging, results, report page."""
