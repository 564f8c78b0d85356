"""Runs `python -m peftjax`."""

from .cli import main

main()
