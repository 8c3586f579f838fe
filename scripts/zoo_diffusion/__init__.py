"""Training stages of the bundled diffusion pipeline; started by train_zoo_diffusion.py."""
