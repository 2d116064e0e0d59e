"""Helpers that several stages share, each written once. Nothing here knows of preferences."""
