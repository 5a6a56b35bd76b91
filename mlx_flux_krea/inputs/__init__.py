"""Inputs: what a picture is made of besides its prompt."""
