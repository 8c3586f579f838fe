"""Channels while a model trains: watched, classified as dead or alive, revived, and looked at through a lens."""

from pysteer.dynamics.activations import nudge_plan
from pysteer.dynamics.classify import Classifier, DeadChannels, Quantile
from pysteer.dynamics.history import History
from pysteer.dynamics.interventions import Add, Nudger, Reinitialise, Reset, Scale, When
from pysteer.dynamics.lens import Lens, ablation_effect, activation_grid
from pysteer.dynamics.monitor import Monitor
from pysteer.dynamics.points import Point, choose_points
from pysteer.dynamics.weights import WeightHealth
from pysteer.dynamics.window import Window

__all__ = [
    "Add",
    "Classifier",
    "DeadChannels",
    "History",
    "Lens",
    "Monitor",
    "Nudger",
    "Point",
    "Quantile",
    "Reinitialise",
    "Reset",
    "Scale",
    "WeightHealth",
    "When",
    "Window",
    "ablation_effect",
    "activation_grid",
    "choose_points",
    "nudge_plan",
]
