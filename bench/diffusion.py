"""Cost of steering the bundled diffusion pipeline at every site of its UNet, and of unlearning with an autoencoder.

    python -m bench.diffusion --quick

Short for `python -m bench.speed --part unet --part unlearning`.
"""

import sys

from bench.speed import main

if __name__ == "__main__":
    main(["--part", "unet", "--part", "unlearning", *sys.argv[1:]])
