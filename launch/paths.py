"""The path of the checkout, defined only here."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
