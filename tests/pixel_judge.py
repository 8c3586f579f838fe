"""A judge of images by their pixels, for recipes that are tested without a classifier."""

from pysteer.recipes.prototype.judge import Judgement


class PixelJudge:
    """Labels by the mean of a channel, features by pixels."""

    def __init__(self, classifier: object) -> None:
        pass

    def __call__(self, images):
        pixels = images.float()
        bright = pixels[..., 0].mean((1, 2)) > pixels[..., 1].mean((1, 2))
        colour = ["red" if bit else "blue" for bit in bright]
        shape = ["square" if bit else "circle" for bit in pixels[..., 2].mean((1, 2)) > 127]
        return Judgement({"shape": shape, "colour": colour, "background": ["none"] * len(shape)}, pixels.flatten(1))
