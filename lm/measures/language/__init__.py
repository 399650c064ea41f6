"""How well a text is predicted: by position, far back, smoothly."""
