"""What computes attention: one softmax over a union of disjoint branches (`branches`), on a backend (`attend`)."""
