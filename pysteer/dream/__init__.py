"""Features of diffusion models: training sparse autoencoders, capture, analysis by timestep, priors, dreams."""
