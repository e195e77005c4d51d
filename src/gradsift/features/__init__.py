"""One vector an example: projected gradients or embeddings, for the methods that compare examples with each other."""
