"""Parts of the recipes `act-text` and `act-image`: transporting activations, as Linear-AcT does."""
