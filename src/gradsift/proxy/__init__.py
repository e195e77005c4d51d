"""The proxy ensemble. Each epoch of each member is a unit of work, with an artifact of its own."""
