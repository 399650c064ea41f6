"""What an experiment is: its settings, its arms, its config file and its claims."""
