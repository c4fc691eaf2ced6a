"""Shared by all rooms: paths, untrusted data, printing of names and tables."""
