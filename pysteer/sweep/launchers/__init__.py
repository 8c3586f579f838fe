"""How cells reach workers: in this process, in processes of this machine, as jobs of SLURM, or with Ray."""
