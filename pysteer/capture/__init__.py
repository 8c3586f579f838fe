"""Capture: recording activations and fitting methods from them."""

from pysteer.capture.fit import fit
from pysteer.capture.fitted import Fitted
from pysteer.capture.groups import align_tokens
from pysteer.capture.recorder import Recorder

__all__ = ["Fitted", "Recorder", "align_tokens", "fit"]
