"""Parts of the recipe `vae-dynamics`."""
