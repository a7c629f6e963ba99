"""Command-line scripts; nothing imports from here."""
