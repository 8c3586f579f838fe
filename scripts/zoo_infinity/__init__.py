"""Training stages of the bundled generator; started by train_zoo_infinity.py."""
