"""The command line; `kedit --help` lists its commands."""

from kedit_jax.cli.app import main

__all__ = ["main"]
