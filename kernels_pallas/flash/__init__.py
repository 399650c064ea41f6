"""Score-and-mask flash attention: output and log-sum-exp, gradient through both, empty tiles never visited."""
