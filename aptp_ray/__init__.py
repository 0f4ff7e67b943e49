"""APTP on Ray: prunes a text-to-image diffusion model by prompt into a mixture of smaller experts, and serves them."""

from importlib import metadata

try:
    __version__ = metadata.version("aptp-ray")
except metadata.PackageNotFoundError:  # used from a checkout that was not installed
    __version__ = "0.0.0"
