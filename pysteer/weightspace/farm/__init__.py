"""Training many small LoRAs side by side, on a frozen denoiser that is run once for all of them."""
