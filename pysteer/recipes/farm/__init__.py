"""Parts of the recipe `lora-farm`."""
