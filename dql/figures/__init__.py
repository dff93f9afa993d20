"""`dql figure`: the paper's three claims, each as a picture with its numbers."""
