"""Tasks with an answer beside the text: densities that are known, series that go on."""
