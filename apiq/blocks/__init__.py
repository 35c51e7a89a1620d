"""The walk over the transformer blocks of a model: where they are, what they are fed, one after another."""
