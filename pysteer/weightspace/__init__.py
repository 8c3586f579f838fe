"""Collections of LoRA adapters: read them, understand them, steer with them."""
