"""Inputs of a picture besides its prompt: images, masks, maps, references and styles."""
