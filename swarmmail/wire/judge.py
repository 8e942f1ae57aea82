"""The judge: bytes of captures in, what is in them out. Pure."""
