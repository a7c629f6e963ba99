"""What a person runs by hand; nothing imports from here."""
