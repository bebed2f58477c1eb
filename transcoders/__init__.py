"""Dictionaries that map one activation to another."""
