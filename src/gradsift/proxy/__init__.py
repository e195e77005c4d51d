"""The proxy ensemble: one member and epoch is one unit of work and of resume."""
