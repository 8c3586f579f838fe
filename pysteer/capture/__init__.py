"""Capture: recording activations, keeping them, and fitting methods from them."""

from pysteer.capture.examples import Examples
from pysteer.capture.fit import fit
from pysteer.capture.fit_stored import fit_stored
from pysteer.capture.fitted import Fitted
from pysteer.capture.groups import align_tokens
from pysteer.capture.moments import Moments
from pysteer.capture.recorder import Recorder
from pysteer.capture.store import ActivationStore
from pysteer.capture.stream import capture, capture_moments

__all__ = [
    "ActivationStore",
    "Examples",
    "Fitted",
    "Moments",
    "Recorder",
    "align_tokens",
    "capture",
    "capture_moments",
    "fit",
    "fit_stored",
]
