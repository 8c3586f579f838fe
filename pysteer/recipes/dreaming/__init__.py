"""Parts of the recipes `dream`, `sae` and `unlearn`: prompts, stages, report."""
