"""The command line: ``kompakt COMMAND``; see ``kompakt --help``."""

from kompakt.cli.main import main

__all__ = ["main"]
