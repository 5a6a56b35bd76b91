"""What a picture is made of besides its prompt: images, masks, maps, references and styles."""
