"""How an experiment runs: jobs, their cache, the parameters they need, what a run tells while it works."""
