"""Commands that run no experiment: text from a model, tasks, checkpoints in other forms, a list of what there is."""
