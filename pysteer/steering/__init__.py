"""Steering: what to change (`Plan`), where (`Site`), and the context manager that does it (`steer`)."""

from pysteer.steering.attach import Applier, Attachment, attach
from pysteer.steering.bake import bake, bake_lora
from pysteer.steering.given import channels, latents, vector
from pysteer.steering.handle import Handle, SiteReport, steer
from pysteer.steering.plan import Plan, PlanEntry, SiteParameters
from pysteer.steering.site import Site
from pysteer.steering.table import Table

__all__ = [
    "Applier",
    "Attachment",
    "Handle",
    "Plan",
    "PlanEntry",
    "Site",
    "SiteParameters",
    "SiteReport",
    "Table",
    "attach",
    "bake",
    "bake_lora",
    "channels",
    "latents",
    "steer",
    "vector",
]
