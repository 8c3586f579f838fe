"""Move an adapter that draws red things towards blue, in weights and in activations, and count what is drawn."""

from pathlib import Path

import torch

import pysteer
from pysteer.weightspace import Directions, LoraSet, attached, layer_inputs, plan_of, predicted_shifts

adapters = LoraSet.open(Path(__file__).parent / "collection", cache="results/example-rows")
directions = Directions(adapters)
to_blue = directions.between("colour=blue", "colour=red")
red = adapters.labels.index("colour=red")

pipe = pysteer.zoo.load("diffusion-shapes")
pipe.pipe.set_progress_bar_config(disable=True)
judge = pysteer.zoo.load_classifier("shapes")
settings = {"num_inference_steps": 20, "guidance_scale": 1.0}
prompts = [""] * 16

for t in (0.0, 0.5, 1.0, 2.0):
    edited = directions.edit(red, to_blue, t, rank=4)
    with torch.no_grad(), attached(pipe, edited):
        colours = judge.classify(pipe(prompts, seeds=0, **settings).images).labels["colour"]
    print(f"weights, t = {t}: {colours.count('red')} red, {colours.count('blue')} blue of {len(colours)}")

# The same direction as a shift of activations: what dW predicts for the mean input of every layer and step.
change = directions.adapter(to_blue, rank=4)
with torch.no_grad():
    shifts = predicted_shifts(change, layer_inputs(pipe, adapters.layers, prompts, **settings))
for t in (0.0, 1.0, 4.0):
    with torch.no_grad(), pysteer.steer(pipe, plan_of(shifts), strength=t):
        colours = judge.classify(pipe(prompts, seeds=0, **settings).images).labels["colour"]
    print(f"activations, strength {t}: {colours.count('red')} red, {colours.count('blue')} blue of {len(colours)}")
