"""One vector per example: projected gradients or embeddings, for methods that compare examples with each other."""
